"""First run: which runtimes answer on this machine? One free GET per well-known port, all in parallel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.errors import UpstreamError
from gateway.runtimes import RUNTIMES, guess
from gateway.upstreams.control import Answer, Control
from gateway.upstreams.reasons import error_text

#: port -> the runtimes whose default it is
PORTS: Final[tuple[tuple[int, tuple[str, ...]], ...]] = (
    (11434, ("ollama",)),
    (8000, ("vllm",)),
    (8080, ("llamacpp", "localai")),
    (4000, ("litellm",)),
    (1234, ("lmstudio",)),
)


@dataclass(frozen=True, slots=True)
class Found:
    """A runtime that answered. `runtime` is a key of RUNTIMES and `base_url` an OpenAI base ("…/v1").

    `note` says why it cannot be used as it is ("wants an API key"), "" if it can.
    """

    runtime: str
    base_url: str
    models: tuple[str, ...]
    note: str = ""


async def detect(
    control: Control,
    timeout_s: float = 0.3,
    ports: Sequence[tuple[int, tuple[str, ...]]] = PORTS,
    host: str = "127.0.0.1",
) -> list[Found]:
    """The runtimes at `ports` of `host`, in the order of `ports`. Costs no tokens and wakes no model."""
    found = await asyncio.gather(*(_look(control, timeout_s, f"http://{host}:{port}", names) for port, names in ports))
    return [one for one in found if one is not None]


def table(found: Sequence[Found]) -> str:
    """Aligned text, one line per runtime under a heading; "" if there is none."""
    if not found:
        return ""
    rows = [("RUNTIME", "ADDRESS", "MODELS")]
    rows += [(RUNTIMES[one.runtime].title, one.base_url, _models(one)) for one in found]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{title:<{wide[0]}}  {url:<{wide[1]}}  {models}".rstrip() for title, url, models in rows)


def _models(one: Found) -> str:
    shown = ", ".join(one.models[:6])
    if len(one.models) > 6:
        shown += f", and {len(one.models) - 6} more"
    return f"{shown} ({one.note})" if shown and one.note else shown or one.note


async def _look(control: Control, timeout_s: float, root: str, names: tuple[str, ...]) -> Found | None:
    try:
        answer = await control.get(root + RUNTIMES[names[0]].models_path, timeout_s=timeout_s)
    except UpstreamError:
        return None  # nothing there, or nothing that speaks HTTP in time: the usual case, and no fault
    base_url = f"{root}/v1"
    if answer.status != 200:
        return _not_ready(answer, base_url, names)
    try:
        name = guess(answer.server, answer.body)
        models = RUNTIMES[name].parse_models(answer.body)
    except ValueError:
        return None  # some other web server
    return Found(name, base_url, models, "" if models else "no models yet")


def _not_ready(answer: Answer, base_url: str, names: tuple[str, ...]) -> Found | None:
    """A runtime that answers but does not list its models: it is loading, or it wants a key.

    Only an error in a runtime's own JSON counts: on these ports any development server may listen.
    """
    name = "llamacpp" if answer.server.lower().startswith("llama.cpp") else names[-1]
    text = error_text(answer.body)
    if not text:
        return None
    if answer.status == 401:
        return Found(name, base_url, (), "wants an API key")
    if answer.status == 503 and name == "llamacpp":
        return Found(name, base_url, (), text)
    return None
