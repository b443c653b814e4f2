"""Reading the ledger: sums over a window of time, and the story of one request.

The store's sums and this machine's journals are joined so that no record is missed and none is counted twice: the
journals are read first, then the store's sums and marks in one script; a journal's record counts if it stands behind
its journal's mark. Without a store the journals are all there is.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.ledger import folded, frames
from gateway.ledger.recovery import decode, entries, journals
from gateway.ledger.shipper import CALL_S, HOURS_KEPT_S, day_key, hour_key, marks_key, sums_of
from gateway.ledger.totals import COUNTS, DAY_S, DIMENSIONS, HOUR_S, TIMES, Totals, add, hours_and_days, merge, rows
from gateway.store.scripts import Script

if TYPE_CHECKING:
    from gateway.ledger.record import Record
    from gateway.store.client import Store

BY: Final = (*TIMES, *DIMENSIONS)
FORMATS: Final = ("table", "csv", "jsonl", "parquet")
_AT_A_TIME: Final = 8
_LONGEST_S: Final = 3660 * DAY_S
_SPAN: Final = re.compile(r"(\d{1,6})([hdw])")
_SPANS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}

#: KEYS: hashes. All as they are at one moment.
_READ: Final = Script(
    "usage",
    """
local found = {}
for i, key in ipairs(KEYS) do found[i] = redis.call('HGETALL', key) end
return found
""",
)


class BadQuery(ValueError):
    """What was asked for cannot be understood; the text says what can."""


def parse_by(text: str) -> tuple[str, ...]:
    """Names of BY, comma-separated; "" is everything in one row."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in BY:
            raise BadQuery(f"`by` takes {', '.join(BY)}, not {name[:40]!r}")
    return names


def parse_time(text: str, now: datetime) -> int:
    """Unix seconds of "7d", "24h", "2w" (ago) or an ISO 8601 date or time (UTC where it names no zone)."""
    span = _SPAN.fullmatch(text.strip())
    try:
        if span is not None:
            return int((now - int(span[1]) * _SPANS[span[2]]).timestamp())
        at = datetime.fromisoformat(text.strip())
        return int((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise BadQuery(
            f"a time is a span such as 24h, 7d, 2w or an ISO date such as 2026-01-31, not {text[:40]!r}"
        ) from None


@dataclass(frozen=True, slots=True)
class Window:
    """What is asked for: rows by these names, over [since, until) in Unix seconds; whole hours, but for the one now."""

    by: tuple[str, ...]
    since: int
    until: int

    @classmethod
    def parse(cls, by: str, since: str, until: str, now: datetime) -> Window:
        """From the texts of an operator; "" for until is now. Raises BadQuery."""
        names = parse_by(by)
        begin = parse_time(since, now) // HOUR_S * HOUR_S
        end = parse_time(until, now) if until else int(now.timestamp()) + 1
        if begin >= end:
            raise BadQuery("the time ends before it begins")
        # Sums are by hour, and of long ago by day: what is asked for begins and ends where they do.
        hours_since = int(now.timestamp()) - HOURS_KEPT_S
        if until:
            end = -(-end // HOUR_S) * HOUR_S
        if "hour" in names and begin < hours_since:
            raise BadQuery(f"hours are kept for {HOURS_KEPT_S // DAY_S} days; ask by day")
        if begin < hours_since:
            begin = begin // DAY_S * DAY_S
        if end < hours_since:
            end = -(-end // DAY_S) * DAY_S
        if end - begin > _LONGEST_S:
            raise BadQuery("ask for ten years or less")
        return cls(names, begin, end)

    def document(self) -> dict[str, Any]:
        return {
            "since": datetime.fromtimestamp(self.since, UTC).isoformat(),
            "until": datetime.fromtimestamp(self.until, UTC).isoformat(),
            "by": list(self.by),
        }


async def usage(root: Path, store: Store | None, window: Window, *, key: str | None = None) -> list[dict[str, Any]]:
    """One row for each combination of what the window is `by`, as `totals.rows` shapes them. `key`: only what this key
    used. Raises StoreAway.
    """
    local = await asyncio.to_thread(_local, root, window)
    folds = await asyncio.to_thread(folded.read, root)
    found = folds.totals(window.since, window.until)
    marks: Mapping[str, int] = {}
    gone: set[str] = set()
    if store is not None:
        hours, days = hours_and_days(window.since, window.until, by_hour="hour" in window.by)
        busy = {int(record.at) // size * size for _, _, record in local for size in (HOUR_S, DAY_S)}
        marks = await _sums(store, hours, days, busy, found)
        # A journal that was removed since it was read is in the store, and its mark went with it.
        unmarked = {journal for journal, _, _ in local} - marks.keys()
        gone = {journal for journal in unmarked if not (root / journal).exists()}
    for journal, position, record in local:
        if journal not in gone and position > max(marks.get(journal, 0), folds.marks.get(journal, 0)):
            add(found, record)
    if key is not None:
        found = {place: sums for place, sums in found.items() if place.key == key}
    return rows(found, window.by)


async def _sums(
    store: Store, hours: Sequence[int], days: Sequence[int], busy: Container[int], found: Totals
) -> dict[str, int]:
    """Add the store's sums to `found`; the journals' marks.

    The times that are `busy` in a journal are read in the moment of the marks. The others are read a few at a time,
    so that a long report holds up no request that waits for its limits.
    """
    keys = [(at, hour_key(store, at)) for at in hours] + [(at, day_key(store, at)) for at in days]
    quiet = [one for one in keys if one[0] not in busy]
    for start in range(0, len(quiet), _AT_A_TIME):
        some = quiet[start : start + _AT_A_TIME]
        _merge(found, some, await store.run(_READ, [key for _, key in some], timeout_s=CALL_S))
    moving = [one for one in keys if one[0] in busy]
    flat_marks, *hashes = await store.run(_READ, [marks_key(store), *(key for _, key in moving)], timeout_s=CALL_S)
    _merge(found, moving, hashes)
    return {name.decode(): int(mark) for name, mark in zip(flat_marks[::2], flat_marks[1::2], strict=True)}


def _merge(found: Totals, keys: Sequence[tuple[int, str]], hashes: Sequence[Sequence[bytes]]) -> None:
    for (at, _), flat in zip(keys, hashes, strict=True):
        for place, sums in sums_of(at, flat).items():
            merge(found, place, sums)


def _local(root: Path, window: Window) -> list[tuple[str, int, Record]]:
    """(journal, position, record) of every record that is still in a journal."""
    found = []
    for folder in journals(root):
        for entry in entries(folder):
            if entry.kind == frames.FINAL:
                try:
                    record = decode(entry.payload)
                except msgspec.DecodeError:  # of another version; shipping leaves it out, too
                    continue
                if window.since <= record.at < window.until:
                    found.append((folder.name, entry.position, record))
    return found


# -- how rows are shown ---------------------------------------------------------------------------------------------


def render(found: Sequence[Mapping[str, Any]], form: str) -> str:
    """Rows as an aligned table, CSV (RFC 4180) or JSON lines."""
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    names = list(found[0]) if found else []
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(found)
        return out.getvalue()
    if not found:
        return "nothing was used in this time\n"
    table = [names, *([_cell(row[name]) for name in names] for row in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(names))]
    numeric = [isinstance(found[0][name], int | float) or found[0][name] is None for name in names]
    lines = []
    for line in table:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def parquet(found: Sequence[Mapping[str, Any]], by: Sequence[str]) -> bytes:
    """Rows as a Parquet file, also where there are none: hours as timestamps in UTC, days as dates, counts as 64-bit
    integers, cost and seconds as doubles, names as texts. Raises ImportError without pyarrow.
    """
    import pyarrow
    import pyarrow.parquet

    times = {"hour": pyarrow.timestamp("ms", tz="UTC"), "day": pyarrow.date32()}
    columns = [(name, times.get(name, pyarrow.string())) for name in by]
    columns += [(name, pyarrow.int64()) for name in COUNTS]
    columns += [(name, pyarrow.float64()) for name in ("cost", "upstream_s")]
    rows = []
    for row in found:
        rows.append(dict(row))
        if "hour" in row:
            rows[-1]["hour"] = datetime.fromisoformat(row["hour"])
        if "day" in row:
            rows[-1]["day"] = date.fromisoformat(row["day"])
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(columns)), out)
    return out.getvalue()
