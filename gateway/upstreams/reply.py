"""Reply: one answer of an upstream, from the moment its request was written to the end of its body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

from gateway.wire.head import ResponseHead
from gateway.wire.opening import opening

if TYPE_CHECKING:
    from gateway.upstreams.connection import Connection

#: a stream is read this far ahead of a client before its sink is attached
READ_AHEAD_BYTES: Final = 64 * 1024
#: an unstreamed answer up to this size is gathered whole before anything is said to the client
GATHER_BYTES: Final = 1024 * 1024
_NO_HEAD: Final = ResponseHead(b"", 0)

Sink = Callable[[bytes], None]


class StaleConnection(Exception):
    """A pooled connection turned out to be closed before any byte of the answer: safe to send again, once."""


class Reply:
    """One answer of an upstream, from the moment its request was written.

    `head` is empty until `head_complete`; after `Transport.send` it always is. `moved_at` is when the answer last moved
    on, where the idle deadline starts anew: the sink sets it, since comment lines are no progress.
    """

    __slots__ = (
        "_buffer",
        "_buffered_bytes",
        "_connection",
        "_error",
        "_paused",
        "_waiter",
        "complete",
        "first_byte_at",
        "head",
        "head_complete",
        "moved_at",
        "opening",
        "received",
        "sent_at",
        "sink",
        "timeouts",
    )

    def __init__(self, connection: Connection, sent_at: float) -> None:
        self.timeouts = connection.upstream.timeouts  # for this exchange, whatever a reload brings
        self._connection: Connection | None = connection
        self.sent_at = sent_at
        self.head = _NO_HEAD
        self.head_complete = False
        self.complete = False
        self.received = False  # any byte of an answer
        self.first_byte_at = 0.0  # of a stream: of its first content
        self.opening: bytes | None = None  # of a stream: the event that it began with, an error maybe
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self.sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._paused = False
        self.moved_at = sent_at

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def streaming(self) -> bool:
        """The body is a stream of events: SSE or NDJSON."""
        return self.head.streaming

    # -- what the relay does ------------------------------------------------------------------------------------

    def body(self) -> bytes:
        """The gathered body of a complete answer."""
        return self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)

    def attach(self, sink: Sink) -> None:
        """From now on every piece of body goes straight to `sink`, what was buffered first."""
        self.sink = sink
        if self._paused:  # by the read-ahead; before the sink is called, which may have its own reason to pause
            self.resume()
        self.moved_at = monotonic()
        if self._buffer:
            data = self.body()
            self._buffer.clear()
            self._buffered_bytes = 0
            sink(data)

    def pause(self) -> None:
        """Stop reading the upstream: the client does not keep up. It is not the upstream's idleness then."""
        connection = self._connection
        if connection is not None and not self._paused:
            self._paused = True
            connection.pause_reading()

    def resume(self) -> None:
        connection = self._connection
        if connection is not None and self._paused:
            self._paused = False
            self.moved_at = monotonic()
            connection.resume_reading()

    async def ended(self) -> None:
        """Wait for the end of the answer.

        Raises UpstreamBroken or UpstreamTimeout if it was cut, and whatever the sink raised.
        """
        while not self.complete and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give the exchange up; the upstream sees its connection closed at once, unless the answer was complete."""
        connection, self._connection = self._connection, None
        self.sink = None
        if connection is not None:
            connection.abort()

    def overdue(self, now: float) -> str:
        """The name of the deadline that has passed at `now`, "" for none."""
        timeouts = self.timeouts
        if timeouts.total_s is not None and now - self.sent_at >= timeouts.total_s:
            return "total"
        if self._paused:  # the client is waited for, not the upstream
            return ""
        if not self.first_byte_at:
            name, limit_s = "first_byte", timeouts.first_byte_s
        else:
            name, limit_s = "idle", timeouts.idle_s
        return name if limit_s is not None and now - self.moved_at >= limit_s else ""

    # -- what the connection does -------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the client could be answered; see the module's docstring for when that is."""
        if not self._is_ready() and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    def _is_ready(self) -> bool:
        if self.complete:
            return True
        if self.head.streaming:
            return self.opening is not None or self._buffered_bytes >= READ_AHEAD_BYTES
        return self._buffered_bytes >= GATHER_BYTES

    def _wait(self) -> asyncio.Future[None]:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        return waiter

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def take(self, data: bytes) -> None:
        """Keep a piece of body that came before there was a sink."""
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        if self.head.streaming and self.opening is None:
            # The first-byte deadline runs on until there is content.
            if not self.complete and b"\n" not in data and b"\r" not in data:
                return
            self.opening = opening(self.body(), lines=self.head.lines, ended=self.complete)
            if self.opening is None and self._buffered_bytes < READ_AHEAD_BYTES:
                return
        self.moved_at = monotonic()
        if not self.first_byte_at:
            self.first_byte_at = self.moved_at
        if self.complete:  # `finish` follows, and wakes
            return
        if self._is_ready():
            if self._buffered_bytes >= READ_AHEAD_BYTES:
                self.pause()
            self._wake()

    def finish(self) -> None:
        """The answer is complete; the connection is no longer ours."""
        self.complete = True
        self._connection = None
        if self.head.streaming and self.opening is None and self._buffer:
            self.opening = opening(self.body(), lines=self.head.lines, ended=True)
        if not self.first_byte_at:
            self.first_byte_at = monotonic()
        self._wake()

    def fail(self, error: Exception) -> None:
        self._connection = None
        if self._error is None:
            self._error = error
        self._wake()

    def __repr__(self) -> str:
        state = "complete" if self.complete else "streaming" if self.streaming else "waiting"
        return f"<Reply {self.status or '…'} {state}>"
