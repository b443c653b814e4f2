"""The story of one request: who asked, what the limits granted, who answered, what was used and owed.

Looked for in this machine's journals, then among the store's newest records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.ledger import frames
from gateway.ledger.marks import Opened
from gateway.ledger.recovery import decode, entries, journals
from gateway.ledger.shipper import newest

if TYPE_CHECKING:
    from gateway.ledger.record import Record
    from gateway.store.client import Store

_SOURCES: Final = {
    "loan": "granted by this process from what the store had lent it",
    "store": "granted by the store",
    "share": "granted by this process from its own share",
    "observed": "would have been refused; this limit only observes",
    "refused": "refused",
}


async def explain(root: Path, store: Store | None, request_id: str) -> dict[str, Any] | None:
    """What became of one request: the fields of its record, with `limits` as objects, and `found_in` ("journal" or
    "store"); of one that runs the admission only, `open` true; None for one nobody knows. Raises StoreAway.
    """
    story = await asyncio.to_thread(_find, root, request_id)
    if story is not None and not story["open"]:
        return story
    if store is not None:
        needle = request_id.encode()
        async for _, payload in newest(store):
            if needle in payload:
                one = decode(payload)
                if one.request_id == request_id:
                    return _told(one, "store")
    return story


def _find(root: Path, request_id: str) -> dict[str, Any] | None:
    needle = request_id.encode()
    opened: dict[str, Any] | None = None
    for folder in journals(root):
        for entry in entries(folder):
            if needle not in entry.payload:
                continue
            if entry.kind == frames.FINAL:
                one = decode(entry.payload)
                if one.request_id == request_id:
                    return _told(one, "journal")
            elif entry.kind == frames.OPEN:
                mark = msgspec.json.decode(entry.payload, type=Opened)
                if mark.id == request_id:
                    told = dict(zip(mark.__struct_fields__, msgspec.to_builtins(mark), strict=True))
                    opened = {"found_in": "journal", "open": True, "request_id": told.pop("id"), **told}
    return opened


def _told(record: Record, found_in: str) -> dict[str, Any]:
    story = {"found_in": found_in, "open": False, **msgspec.to_builtins(msgspec.structs.asdict(record))}
    story["limits"] = [msgspec.structs.asdict(one) for one in record.limits]
    return story


def text(story: Mapping[str, Any]) -> str:
    """The story for people, one line for each step of the decision."""
    width = max(len(name) for name, _ in _lines(story))
    told, before = [], ""
    for name, line in _lines(story):
        told.append(f"{'' if name == before else name:<{width}}  {line}\n")
        before = name
    return "".join(told)


def _lines(story: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    at = datetime.fromtimestamp(story["at"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    yield "request", f"{story['request_id']}, {story['method']} {story['route']}, {at}"
    if story.get("client"):
        yield "client", story["client"]
    group = f", group {story['group']}" if story["group"] else ""
    yield "principal", f"{story['key']}{group}"
    if story["model"]:
        asked = f", asked for as {story['model_asked']}" if story.get("model_asked") else ""
        yield "model", f"{story['model']}{asked}"
    for limit in story.get("limits", ()):
        yield "limits", _limit(limit)
    if story["upstream"]:
        why = f", chosen as {story['route_reason']}" if story.get("route_reason") else ""
        yield "upstream", f"{story['upstream']} of {story['provider']}{why}"
    if story["attempts"]:
        yield "attempts", str(story["attempts"])
    for number, attempt in enumerate(story.get("attempts_made", ()), 1):
        status = f", status {attempt['status']}" if attempt["status"] else ""
        yield (
            "attempts",
            f"{number}. {attempt['upstream']}: {attempt['outcome']} after {attempt['seconds']:g} s{status}",
        )
    if story["open"]:
        yield "outcome", "it runs, or its gateway has ended and nobody has recovered it yet"
        return
    yield from _ended(story)


def _ended(story: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if story["prompt_tokens"] is None:
        yield "usage", "none: it reached no model"
    else:
        counted = ", counted by the gateway" if story["estimated"] else ""
        read = f"{story['prompt_tokens']} tokens in ({story['cached_tokens']} cached)"
        yield "usage", f"{read}, {story['completion_tokens']} out ({story['reasoning_tokens']} reasoning){counted}"
        yield "cost", "not known: no price" if story["cost"] is None else f"{story['cost']:.10g}"
    first = "" if story["ttft_s"] is None else f", the first content after {story['ttft_s']:g} s"
    if story.get("believed_cached_tokens") is not None:
        yield "cache", f"about {story['believed_cached_tokens']} tokens of the prompt were expected to be in it"
    for field, words in (("ttft_predicted_s", "predicted first content after"), ("queued_s", "waited for room")):
        if story.get(field):
            first += f", {words} {story[field]:g} s"
    yield "time", f"{story['duration_s']:g} s{first}"
    error = f", {story['error']}" if story["error"] else ""
    yield "outcome", f"{story['outcome']}, status {story['status']}{error}"
    rest = {name: value for name, value in story.items() if name not in _SAID and value not in (None, "", 0, [], ())}
    for name, value in rest.items():  # what other rooms add to the record
        yield "also", f"{name} {value}"
    yield "found in", f"the {story['found_in']}"


def _limit(limit: Mapping[str, Any]) -> str:
    what = f"{limit['name']} (scope {limit['scope']}): {_SOURCES.get(limit['source'], limit['source'])}"
    unit = limit["resource"].replace("_", " ")
    if limit["source"] == "refused":
        return f"{what}; {limit['reserved']:.10g} {unit} were asked for"
    return f"{what}; {limit['reserved']:.10g} {unit} reserved, {limit['used']:.10g} used"


_SAID: Final[Sequence[str]] = (
    *("request_id", "method", "route", "at", "client", "key", "group", "model", "model_asked", "limits", "upstream"),
    *("provider", "route_reason", "attempts", "attempts_made", "open", "prompt_tokens", "completion_tokens"),
    *("cached_tokens", "reasoning_tokens", "estimated", "cost", "ttft_s", "ttft_predicted_s", "queued_s"),
    "believed_cached_tokens",
    *("duration_s", "outcome", "status", "error", "found_in"),
)
