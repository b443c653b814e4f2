"""Sums over records: by hour, key, group, model, provider and upstream. Arithmetic only.

All sums are whole numbers, so that adding them up in any order gives the same: money in billionths, time in
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from gateway.ledger.prices import NANO, nano
from gateway.ledger.record import Record

HOUR_S: Final = 3600
DAY_S: Final = 86400

ERRORS: Final = ("refused", "upstream_error", "client_gone", "partial", "internal_error")
#: the sums, in the order they are shown
SUMS: Final = (
    "requests",
    *ERRORS,
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
    "estimated",  # requests whose usage was counted by the gateway
    "priced",  # requests with a cost
    "unpriced",  # requests that used tokens whose price is not known
    "cost_nano",
    "upstream_ms",
)
#: those that a row shows as they are, as whole numbers
COUNTS: Final = tuple(name for name in SUMS if name not in ("cost_nano", "upstream_ms"))
TIMES: Final = ("hour", "day")
DIMENSIONS: Final = ("key", "group", "model", "provider", "upstream")


class Place(NamedTuple):
    """Where a record is added up. `at`: the Unix time its hour (or day) begins."""

    at: int
    key: str
    group: str
    model: str
    provider: str
    upstream: str


Sums = dict[str, int]
Totals = dict[Place, Sums]


def add(totals: Totals, record: Record) -> None:
    """Count one record in its hour."""
    # A plain tuple: it equals the Place of the same fields, and is made in a third of the time.
    where = (
        int(record.at) // HOUR_S * HOUR_S,
        record.key,
        record.group,
        record.model,
        record.provider,
        record.upstream,
    )
    sums = totals.get(where)  # type: ignore[call-overload]
    if sums is None:
        sums = totals[Place(*where)] = {}
    get = sums.get
    sums["requests"] = get("requests", 0) + 1
    if record.outcome != "ok":
        _count(sums, record.outcome, 1)
    sums["upstream_ms"] = get("upstream_ms", 0) + round(record.upstream_s * 1000)
    if record.prompt_tokens is None:
        return
    sums["input_tokens"] = get("input_tokens", 0) + record.prompt_tokens
    sums["output_tokens"] = get("output_tokens", 0) + (record.completion_tokens or 0)
    if record.cached_tokens:
        _count(sums, "cached_tokens", record.cached_tokens)
    if record.reasoning_tokens:
        _count(sums, "reasoning_tokens", record.reasoning_tokens)
    if record.estimated:
        _count(sums, "estimated", 1)
    if record.cost is None:
        sums["unpriced"] = get("unpriced", 0) + 1
    else:
        sums["priced"] = get("priced", 0) + 1
        _count(sums, "cost_nano", nano(record.cost))


def _count(sums: Sums, name: str, amount: int) -> None:
    if amount:
        sums[name] = sums.get(name, 0) + amount


def merge(totals: Totals, place: Place, sums: Mapping[str, int]) -> None:
    """Add `sums` to what is counted at `place`."""
    mine = totals.setdefault(place, {})
    for name, amount in sums.items():
        _count(mine, name, amount)


def rows(totals: Totals, by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of what `by` names (of TIMES and DIMENSIONS), sorted, with plain field names.

    `cost` is in currency units, null where nothing of it is known; `unpriced` says how many requests it leaves out.
    `upstream_s` is the time upstreams were busy, in seconds.
    """
    grouped: dict[tuple[str, ...], Sums] = {}
    for place, sums in totals.items():
        group = tuple(_label(place, name) for name in by)
        mine = grouped.setdefault(group, {})
        for name, amount in sums.items():
            _count(mine, name, amount)
    return [
        dict(zip(by, group, strict=True)) | _shown(sums)
        for group, sums in sorted(grouped.items(), key=lambda one: one[0])
    ]


def _shown(sums: Mapping[str, int]) -> dict[str, Any]:
    row: dict[str, Any] = {name: sums.get(name, 0) for name in COUNTS}
    known = sums.get("priced", 0) or not sums.get("unpriced", 0)
    row["cost"] = sums.get("cost_nano", 0) / NANO if known else None
    row["upstream_s"] = sums.get("upstream_ms", 0) / 1000
    return row


def _label(place: Place, name: str) -> str:
    if name == "hour":
        return datetime.fromtimestamp(place.at, UTC).strftime("%Y-%m-%dT%H:00Z")
    if name == "day":
        return datetime.fromtimestamp(place.at, UTC).strftime("%Y-%m-%d")
    value: str = getattr(place, name)
    return value


def hours_and_days(since: int, until: int, *, by_hour: bool) -> tuple[list[int], list[int]]:
    """The hours, and the whole days, that cover [since, until) without overlap; Unix times they begin at."""
    first = since // HOUR_S * HOUR_S
    hours: list[int] = []
    days: list[int] = []
    at = first
    while at < until:
        if not by_hour and at % DAY_S == 0 and at + DAY_S <= until:
            days.append(at)
            at += DAY_S
        else:
            hours.append(at)
            at += HOUR_S
    return hours, days


def of(records: Iterable[Record]) -> Totals:
    totals: Totals = {}
    for record in records:
        add(totals, record)
    return totals
