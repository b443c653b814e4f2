"""Tallies: what was posted to this process's journal since it was last shipped, added up as it happens.

The shipper would else read the journal back, decode each record and add it up again, in a thread that takes turns with
the event loop. A tally knows which part of the journal it stands for, so it can be shipped under the same mark as
records that were read; where memory for them ends (the store is away), they are forgotten, and the journal is read.
"""

from __future__ import annotations

import zlib
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
#: of records that wait to be deflated together: as they come, so that their memory is soon used again
DEFLATE_BYTES: Final = 16 * 1024


class Tally:
    """The sums of the `count` records in the journal behind the position `start`, up to and with `end`, and the records
    themselves, deflated.
    """

    __slots__ = (
        "_deflate",
        "_deflated",
        "_payloads",
        "_waiting_bytes",
        "count",
        "end",
        "payload_bytes",
        "start",
        "totals",
    )

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.count = 0
        self.totals: Totals = {}
        self.payload_bytes = 0  # before they were deflated
        self._payloads: list[bytes] = []
        self._waiting_bytes = 0
        self._deflate = zlib.compressobj(1)
        self._deflated: list[bytes] = []

    def post(self, record: Record, payload: bytes, end: int) -> None:
        """Count a record, which lies in the journal as `payload` and ends at the position `end`."""
        add(self.totals, record)
        self.count += 1
        self._payloads.append(payload)
        self._waiting_bytes += len(payload)
        if self._waiting_bytes >= DEFLATE_BYTES:
            self._take_in()
        self.end = end

    def _take_in(self) -> None:
        payloads, self._payloads = self._payloads, []
        if self.payload_bytes:
            payloads.insert(0, b"")  # a line end between those before and these
        self.payload_bytes += self._waiting_bytes
        self._waiting_bytes = 0
        self._deflated.append(self._deflate.compress(b"\n".join(payloads)))

    def close(self) -> None:
        """Nothing is posted any more."""
        self._take_in()
        self._deflated.append(self._deflate.flush())

    @property
    def deflated(self) -> bytes:
        """The records, one a line, of a tally that is closed."""
        return b"".join(self._deflated)

    @property
    def full(self) -> bool:
        return self.count >= RECORDS_MAX or self.payload_bytes >= PAYLOAD_MAX_BYTES or len(self.totals) >= PLACES_MAX

    def __repr__(self) -> str:
        return f"<Tally {self.start}..{self.end} {self.count} records, {len(self.totals)} places>"


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
            if not self._open.count:
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
        self._open.close()
        self._closed.append(self._open)
        self._open = Tally(self._open.end)
