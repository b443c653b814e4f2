"""When to stop asking a store that does not answer. Pure: results and times come in, nothing is awaited.

closed --FAILURES failures in a row--> open --a successful probe--> closed. Half-open is the probe itself: it is sent
by the store's own heartbeat, never by a request, so no request pays for finding out.
"""

from __future__ import annotations

from typing import Final

#: a lone time-out may be a page fault or a rewrite; three in a row are a store that is away
FAILURES: Final = 3


class Breaker:
    """`closed`: calls may go out. `changed_at`: when that last changed, on the caller's monotonic clock."""

    __slots__ = ("changed_at", "closed", "failures")

    def __init__(self, now: float, closed: bool = False) -> None:
        self.closed = closed
        self.failures = 0
        self.changed_at = now

    def __repr__(self) -> str:
        return f"<Breaker {'closed' if self.closed else 'open'}, {self.failures} failures in a row>"

    def succeeded(self) -> None:
        """A call was answered. Does not close an open breaker: the answer may be older than what opened it."""
        self.failures = 0

    def failed(self, now: float) -> bool:
        """A call was not answered. True if this opened the breaker."""
        self.failures += 1
        if not self.closed or self.failures < FAILURES:
            return False
        self.closed = False
        self.changed_at = now
        return True

    def probed(self, now: float) -> bool:
        """A probe was answered as a request would have to be. True if this closed the breaker."""
        self.failures = 0
        if self.closed:
            return False
        self.closed = True
        self.changed_at = now
        return True
