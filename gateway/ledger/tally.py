"""Tallies: what was posted to this process's journal since it was last shipped, added up as it happens.

The shipper would else read the journal back, decode each record and add it up again, in a thread that takes turns with
the event loop. A tally knows which part of the journal it stands for, so it can be shipped under the same mark as
records that were read; where memory for them ends (the store is away), they are forgotten, and the journal is read.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from gateway.ledger.record import Record
from gateway.ledger.totals import Totals, add

#: what one tally, and so one call of the store's script, holds at most
RECORDS_MAX: Final = 1000
PLACES_MAX: Final = 256
PAYLOAD_MAX_BYTES: Final = 512 * 1024
#: full tallies kept for a store that does not take them
KEPT: Final = 64


class Tally:
    """The sums of the records in the journal behind the position `start`, up to and with `end`, and the records."""

    __slots__ = ("end", "payload_bytes", "payloads", "start", "totals")

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.totals: Totals = {}
        self.payloads: list[bytes] = []
        self.payload_bytes = 0

    def post(self, record: Record, payload: bytes, end: int) -> None:
        """Count a record, which lies in the journal as `payload` and ends at the position `end`."""
        add(self.totals, record)
        self.payloads.append(payload)
        self.payload_bytes += len(payload)
        self.end = end

    @property
    def full(self) -> bool:
        return (
            len(self.payloads) >= RECORDS_MAX
            or self.payload_bytes >= PAYLOAD_MAX_BYTES
            or len(self.totals) >= PLACES_MAX
        )

    def __repr__(self) -> str:
        return f"<Tally {self.start}..{self.end} {len(self.payloads)} records, {len(self.totals)} places>"


class Tallies:
    """The tallies that were not shipped yet, oldest first, without a gap between them. `start`: where the first begins;
    what stands before it in the journal is in none of them.
    """

    __slots__ = ("_closed", "_open")

    def __init__(self, start: int) -> None:
        self._closed: deque[Tally] = deque()
        self._open = Tally(start)

    @property
    def start(self) -> int:
        return self._closed[0].start if self._closed else self._open.start

    @property
    def end(self) -> int:
        """Behind the last record."""
        return self._open.end

    def post(self, record: Record, payload: bytes, end: int) -> None:
        one = self._open
        one.post(record, payload, end)
        if one.full:
            self._close()
            if len(self._closed) > KEPT:
                self.restart(end)

    def first(self) -> Tally | None:
        """The oldest, to which nothing is added any more; None if there is no record in any."""
        if not self._closed:
            if not self._open.payloads:
                return None
            self._close()
        return self._closed[0]

    def shipped(self, one: Tally) -> None:
        """`one` is in the store. (It may have been forgotten here meanwhile.)"""
        if self._closed and self._closed[0] is one:
            self._closed.popleft()

    def align(self, mark: int, position: int) -> None:
        """The store has everything up to `mark`, whatever was thought before; the journal now ends at `position`."""
        while self._closed and self._closed[0].end <= mark:
            self._closed.popleft()
        if self.start < mark:  # no border of ours: to be read from the journal
            self.restart(position)

    def restart(self, position: int) -> None:
        """Forget all, and count what is posted behind `position`."""
        self._closed.clear()
        self._open = Tally(position)

    def _close(self) -> None:
        self._closed.append(self._open)
        self._open = Tally(self._open.end)
