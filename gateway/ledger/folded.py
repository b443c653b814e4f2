"""Folded: sums of records that are no longer kept one by one, for a ledger without a store.

With a store, segments are deleted when it has them. Without one they would grow without end, so beyond a size the
oldest are folded: their sums by hour join one file, `folded.json` beside the journals, and the segments go. The file
holds, with the sums, up to where each journal is in them, and is replaced in one step; so a segment whose deletion was
cut short is known to be in it already. Reading takes the journals first, then this file: a record counts if it stands
behind its journal's mark.

Only journals that were begun without a store are folded (they hold the file `alone`): what another may have in a store
is shipped from its journal when that store is back.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from gateway.ledger import frames
from gateway.ledger.recovery import decode
from gateway.ledger.totals import DAY_S, Place, Sums, Totals, add, merge

ALONE: Final = "alone"
_FILE: Final = "folded.json"
_LOCK: Final = ".folded.lock"


class Row(msgspec.Struct, frozen=True, array_like=True):
    at: int
    key: str
    group: str
    model: str
    provider: str
    upstream: str
    sums: Sums


class Folded(msgspec.Struct):
    """`marks`: position in each journal behind what is in the sums. `hours` and, of long ago, `days`."""

    marks: dict[str, int] = {}
    hours: list[Row] = []
    days: list[Row] = []

    def totals(self, since: int, until: int) -> Totals:
        """The sums of [since, until), Unix seconds. Days of long ago are whole days."""
        found: Totals = {}
        for row in (*self.hours, *self.days):
            if since <= row.at < until:
                merge(found, Place(row.at, row.key, row.group, row.model, row.provider, row.upstream), row.sums)
        return found


def read(root: Path) -> Folded:
    """What was folded below `root`. Raises OSError, or ValueError if the file is damaged."""
    try:
        return msgspec.json.decode((root / _FILE).read_bytes(), type=Folded)
    except FileNotFoundError:
        return Folded()
    except msgspec.DecodeError as error:
        raise ValueError(f"{root / _FILE} cannot be understood: {error}") from error


def size_bytes(root: Path) -> int:
    """What all journals take."""
    found = 0
    for path in root.glob(f"*/*{frames.SUFFIX}"):
        try:
            found += path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def fold(root: Path, chosen: Sequence[tuple[Path, int]], hours_since: int) -> int:
    """Fold these segments (journal's folder and number; of a journal its oldest, in order) and delete them.

    Hours before `hours_since` become days. The number of records; what cannot be read in a segment is not in them.
    Raises OSError or ValueError; then nothing is lost, and it can be tried again.
    """
    with _locked(root):
        folded = read(root)
        totals: Totals = {}
        count = 0
        done = {folder.name: folded.marks.get(folder.name, 0) for folder, _ in chosen}
        for folder, number in chosen:
            mark = frames.position(number + 1, 0)
            if done[folder.name] >= mark:
                continue
            for part in frames.unpack(frames.segment_path(folder, number).read_bytes()):
                if isinstance(part, frames.Frame) and part.kind == frames.FINAL:
                    try:
                        add(totals, decode(part.payload))
                    except msgspec.DecodeError:  # of another version; shipping leaves it out, too
                        continue
                    count += 1
            done[folder.name] = mark
        # A reader may have read a journal before it went: its mark stays until the next time.
        marks = {name: mark for name, mark in folded.marks.items() if (root / name).exists()} | done
        _write(root, _joined(folded, totals, marks, hours_since))
    for folder, number in chosen:
        frames.segment_path(folder, number).unlink(missing_ok=True)
    return count


def trim(root: Path, folder: Path) -> None:
    """Delete the segments of a journal that are folded: their deletion was cut short."""
    mark = read(root).marks.get(folder.name, 0)
    for number, path in frames.segments(folder):
        if frames.position(number + 1, 0) <= mark:
            path.unlink(missing_ok=True)


def _joined(folded: Folded, more: Totals, marks: dict[str, int], hours_since: int) -> Folded:
    hours: Totals = {}
    days: Totals = {}
    for rows, into in ((folded.hours, hours), (folded.days, days)):
        for row in rows:
            into[Place(row.at, row.key, row.group, row.model, row.provider, row.upstream)] = dict(row.sums)
    for place, sums in more.items():
        merge(hours, place, sums)
    for place in [place for place in hours if place.at < hours_since]:
        merge(days, place._replace(at=place.at // DAY_S * DAY_S), hours.pop(place))
    return Folded(marks, *([Row(*place, sums) for place, sums in sorted(one.items())] for one in (hours, days)))


def _write(root: Path, folded: Folded) -> None:
    draft = root / f"{_FILE}.draft"
    fd = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(folded))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(root / _FILE)
    folder = os.open(root, os.O_RDONLY)  # the new name must be on the disk before the segments go
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time."""
    fd = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
