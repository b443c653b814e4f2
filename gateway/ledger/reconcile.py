"""Does the ledger say what the engines say? Arithmetic over two readings of both.

An engine's counters begin anew when it restarts, and ours are sums over hours, so neither is compared as it stands: a
first reading of both is kept, and what was added to each since is compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

#: counters of prompt and generated tokens, by who exposes them
PROMPT: Final = ("vllm:prompt_tokens_total", "llamacpp:prompt_tokens_total")
GENERATED: Final = ("vllm:generation_tokens_total", "llamacpp:tokens_predicted_total")
_SAMPLE: Final = re.compile(r"(?m)^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?[ \t]+([0-9.eE+-]+)(?:[ \t]+-?\d+)?[ \t]*$")


class Tokens(msgspec.Struct, frozen=True):
    """Prompt and generated tokens counted so far."""

    prompt: int
    generated: int


class Reading(msgspec.Struct, frozen=True):
    """The ledger's sums since the Unix time `since`, and the engines' counters, by upstream; read at Unix time `at`."""

    at: float
    since: int
    ledger: dict[str, Tokens]
    engines: dict[str, Tokens]


def engine_tokens(exposition: str) -> Tokens | None:
    """An engine's counters from its metrics page (Prometheus text format); None if it has none that are known here."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(exposition):
        if name in PROMPT or name in GENERATED:
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        return None
    return Tokens(
        round(sum(sums.get(name, 0.0) for name in PROMPT)), round(sum(sums.get(name, 0.0) for name in GENERATED))
    )


def compare(before: Reading, now: Reading, trouble: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each upstream: tokens added to the ledger and to the engine since `before`, and the ledger's less the
    engine's. Numbers are null where there is nothing to compare; `note` says why. `trouble`: engines that could not
    be read now.
    """
    rows = []
    for name in sorted({*now.ledger, *now.engines, *trouble}):
        then, engine = before.engines.get(name), now.engines.get(name)
        nothing = Tokens(0, 0)
        mine, mine_then = now.ledger.get(name, nothing), before.ledger.get(name, nothing)
        row: dict[str, Any] = {
            "upstream": name,
            "ledger_input_tokens": mine.prompt - mine_then.prompt,
            "ledger_output_tokens": mine.generated - mine_then.generated,
        }
        note = trouble.get(name, "")
        if engine is None:
            note = note or "the engine exposes no token counters that are known here"
        elif then is None:
            note = "the engine was not read before"
        elif engine.prompt < then.prompt or engine.generated < then.generated:
            note = "the engine was restarted: its counters began anew"
        if engine is None or then is None or note:
            row |= dict.fromkeys(
                ("engine_input_tokens", "engine_output_tokens", "input_difference", "output_difference")
            )
        else:
            row["engine_input_tokens"] = engine.prompt - then.prompt
            row["engine_output_tokens"] = engine.generated - then.generated
            row["input_difference"] = row["ledger_input_tokens"] - row["engine_input_tokens"]
            row["output_difference"] = row["ledger_output_tokens"] - row["engine_output_tokens"]
        rows.append(row | {"note": note})
    return rows
