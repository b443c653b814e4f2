"""The data plane's upstream side: a pooled HTTP/1.1 client whose read callback is the relay.

Bytes read from a runtime are parsed (httptools, the C parser under uvicorn) and handed to the reply's sink in the
same callback: one read, one callback, one write to the client; no task wakes for an event. `Transport.send` gives a
`Reply` once there is something to say: an unstreamed answer when it is whole, a stream when its first body byte is
there, so that everything that fails earlier can still go to another upstream.

Framing follows RFC 9112 section 6.3: chunked, Content-Length, or until close. A truncated answer raises
`UpstreamBroken`; it never looks like an end. An idle connection that the runtime closed while we wrote to it is
replaced once, and only if no byte of an answer had come.

All deadlines of all replies are looked at by one timer every `SWEEP_S`, instead of a timer for each request.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from httptools import HttpParserError, HttpResponseParser

from gateway.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from gateway.upstreams.upstream import Upstream
from gateway.wire.head import HeadCache, ResponseHead

SWEEP_S: Final = 0.05
#: a stream is read this far ahead of a client before its sink is attached
READ_AHEAD_BYTES: Final = 64 * 1024
#: an unstreamed answer up to this size is gathered whole before anything is said to the client
GATHER_BYTES: Final = 1024 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024
_NO_HEAD: Final = ResponseHead(b"", 0)

Sink = Callable[[bytes], None]


class StaleConnection(Exception):
    """A pooled connection turned out to be closed before any byte of the answer: safe to send again, once."""


class Reply:
    """One answer of an upstream, from the moment its request was written.

    `head` is empty until `head_complete`; after `Transport.send` it always is.
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
        self.first_byte_at = 0.0
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

    def progress(self, now: float) -> None:
        """The answer moved on: the idle deadline starts anew. Comment lines are no progress; the sink decides."""
        self.moved_at = now

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
            return self._buffered_bytes > 0
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
        self.moved_at = monotonic()
        if not self.first_byte_at:
            self.first_byte_at = self.moved_at
        self._buffer.append(data)
        if self.complete:  # `finish` follows, and wakes
            return
        self._buffered_bytes += len(data)
        if self._is_ready():
            if self._buffered_bytes >= READ_AHEAD_BYTES:
                self.pause()
            self._wake()

    def finish(self) -> None:
        """The answer is complete; the connection is no longer ours."""
        self.complete = True
        self._connection = None
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


class Connection(asyncio.Protocol):
    """One connection to an upstream, and the parser of its answers. In use exactly while `reply` is set."""

    __slots__ = (
        "_bodiless_bytes",
        "_complete",
        "_ended",
        "_feed",
        "_head",
        "_keep_alive",
        "_parser",
        "_pieces",
        "_pool",
        "_reading_paused",
        "_whole",
        "idle_at",
        "on_body",
        "reply",
        "requests",
        "transport",
        "upstream",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.upstream = pool.upstream
        self.transport: asyncio.Transport | None = None
        self.reply: Reply | None = None
        self.requests = 0
        self.idle_at = 0.0
        self._pieces: list[bytes] = []
        self._whole = 0  # pieces that belong to the answer, once it is complete
        #: the parser's callback for body bytes, read by it once: no frame of ours for each chunk
        self.on_body = self._pieces.append
        self._parser = HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._complete = False
        self._ended = False  # the upstream closed its side in order
        self._keep_alive = False
        self._head = b""  # read of a head that is not complete
        self._bodiless_bytes = 0  # read since the last piece of body: interim heads, chunk sizes, trailers
        self._reading_paused = False

    def begin(self, head: bytes, body: bytes) -> Reply:
        """Write one request. `head` ends with the empty line."""
        transport = self.transport
        assert transport is not None
        assert self.reply is None
        self.requests += 1
        self._complete = False
        self._keep_alive = False
        self._bodiless_bytes = 0
        self._head = b""
        reply = self.reply = Reply(self, monotonic())
        if len(body) < 16 * 1024:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return reply

    def pause_reading(self) -> None:
        if self.transport is not None and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.transport is not None and self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close now, dropping what was not written."""
        reply, self.reply = self.reply, None
        if reply is not None:
            self._pool.active.discard(self)
        if self.transport is not None:
            self.transport.abort()

    # -- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # create_connection gives a full Transport

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:  # bytes that nobody asked for: the connection cannot be trusted
            self._pool.forget(self)
            self.abort()
            return
        if not reply.head_complete:
            reply.received = True
            self._head = self._head + data if self._head else data
        try:
            self._feed(data)
        except HttpParserError as error:
            if not self._complete:
                self._break(f"its answer is not valid HTTP/1.1: {_reason(error)}")
                return
            self._keep_alive = False  # the answer is whole; what followed it is not ours
        pieces = self._pieces
        if self._complete:
            del pieces[self._whole :]
            reply.complete = True  # before the last piece is taken: an unstreamed answer wakes its reader once
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._bodiless_bytes = 0
            sink = reply.sink
            if sink is None:
                reply.take(body)
            else:
                try:
                    sink(body)
                except Exception as error:  # the sink's own: not the upstream's fault, and its caller's to hear
                    self.abort()
                    reply.fail(error)
                    return
        elif not self._complete:
            if reply.head_complete:
                self._bodiless_bytes += len(data)
            if self._bodiless_bytes + len(self._head) > MAX_HEAD_BYTES:
                what = "trailers are" if reply.head_complete else "response head is"
                self._break(f"its {what} larger than {MAX_HEAD_BYTES} bytes")
                return
        if self._complete and self.reply is reply:
            self._done(reply)

    def eof_received(self) -> bool:
        """The upstream says no more. So neither do we: an upload it does not read must not hold up this end."""
        transport = self.transport
        if transport is not None:
            self._ended = _in_order(transport)
            transport.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        del self._parser, self._feed  # they hold our methods: a cycle that only the collector would free
        reply = self.reply
        if reply is None:
            self._pool.forget(self)
            return
        if self._ended and reply.head_complete and reply.head.content_length is None and not reply.head.chunked:
            reply.complete = True  # the answer was delimited by the close
            self._done(reply)
        elif not reply.received and self.requests > 1:
            self.reply = None
            self._pool.active.discard(self)
            reply.fail(StaleConnection())
        elif not reply.received:
            self._break("it closed the connection without an answer")
        else:
            self._break("it closed the connection in the middle of its answer")

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:  # bytes after the end of the answer: take what is ours, trust nothing after it
            self._keep_alive = False

    def on_headers_complete(self) -> None:
        reply = self.reply
        if reply is None or self._complete:
            return
        status: int = self._parser.get_status_code()
        block, _, rest = self._head.lstrip(b"\r\n").partition(b"\r\n\r\n")
        if not 200 <= status <= 599:  # RFC 9110 section 15
            if status == 101:
                raise _Refused("it switched protocols without being asked")
            if not 100 <= status < 200:
                raise _Refused("its status code is invalid")
            self._head = rest  # an interim answer: the real one follows, before too many of them
            self._bodiless_bytes += len(block) + 4
            return
        if len(block) > MAX_HEAD_BYTES:
            raise _Refused(f"its response head is larger than {MAX_HEAD_BYTES} bytes")
        try:
            reply.head = self._pool.heads.read(block, status)
        except ValueError as error:
            raise _Refused(str(error)) from None
        reply.head_complete = True
        self._head = b""

    def on_message_complete(self) -> None:
        reply = self.reply
        if reply is None or not reply.head_complete:  # an interim 1xx answer ended; the real one follows
            return
        if not self._complete:
            self._complete = True
            self._whole = len(self._pieces)
            self._keep_alive = self._parser.should_keep_alive()

    # -- ends ---------------------------------------------------------------------------------------------------

    def _done(self, reply: Reply) -> None:
        self.reply = None
        self._pool.active.discard(self)
        self.resume_reading()
        transport = self.transport
        if transport is not None:
            # An answer that came before our request was written out leaves bytes that the next one must not follow.
            if self._keep_alive and not transport.is_closing() and not transport.get_write_buffer_size():
                self._pool.keep(self)
            else:
                transport.abort()
        reply.finish()

    def _break(self, reason: str) -> None:
        reply = self.reply
        self._pieces.clear()
        self.abort()
        if reply is not None:
            reply.fail(UpstreamBroken(f"provider {self.upstream.provider!r} failed: {reason}"))

    def expire(self, reply: Reply, name: str) -> None:
        """The reply's deadline `name` has passed."""
        timeouts = reply.timeouts
        limit_s = {"first_byte": timeouts.first_byte_s, "idle": timeouts.idle_s, "total": timeouts.total_s}[name]
        what = {
            "first_byte": "did not begin to answer",
            "idle": "stopped in the middle of its answer",
            "total": "did not finish its answer",
        }[name]
        self.abort()
        reply.fail(
            UpstreamTimeout(
                f"provider {self.upstream.provider!r} {what} within {limit_s:g} s ({name} timeout)",
                code=f"upstream_{name}_timeout",
            )
        )

    def __repr__(self) -> str:
        state = "idle" if self.reply is None else repr(self.reply)
        return f"<Connection {self.upstream.name} #{self.requests} {state}>"


class _Refused(Exception):
    """Raised inside a parser callback; httptools turns it into its HttpParserCallbackError."""


def _in_order(transport: asyncio.Transport) -> bool:
    """Whether an end of the stream is the upstream's own word.

    Without TLS a FIN is. With TLS anyone on the way can send one: only a closure alert counts (RFC 9112 section 9.8),
    which OpenSSL tells as an end where it would otherwise ask for more bytes.
    """
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return True
    try:
        return bool(tls.read(1) == b"")
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:
        return False


def _reason(error: Exception) -> str:
    """The parser's words, or the callback's, without any byte of the answer."""
    cause = error.__context__
    return str(cause if isinstance(cause, _Refused) else error)[:200]


class Pool:
    """The connections of one upstream: idle ones, most recently used last, and those in use."""

    __slots__ = ("active", "heads", "idle", "idle_s", "tls", "upstream")

    def __init__(self, upstream: Upstream, idle_s: float, tls: ssl.SSLContext | None) -> None:
        self.upstream = upstream
        self.idle_s = idle_s
        self.tls = tls
        self.idle: deque[Connection] = deque()
        self.active: set[Connection] = set()
        self.heads = HeadCache()

    def keep(self, connection: Connection) -> None:
        connection.idle_at = monotonic()
        self.idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that closed by itself; one that was taken out of `idle` has no `idle_at`."""
        if connection.idle_at:
            connection.idle_at = 0.0
            self.idle.remove(connection)

    def take(self) -> Connection | None:
        """The most recently used connection that is still fresh."""
        while self.idle:
            connection = self.idle.pop()
            idle_at, connection.idle_at = connection.idle_at, 0.0
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            if monotonic() - idle_at >= self.idle_s:
                transport.abort()
                continue
            return connection
        return None

    async def dial(self) -> Connection:
        """Open a connection. Raises UpstreamUnreachable with the reason in words."""
        upstream = self.upstream
        loop = asyncio.get_running_loop()
        timeout_s = upstream.timeouts.connect_s
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    upstream.host,
                    upstream.port,
                    ssl=self.tls,
                    server_hostname=upstream.host if self.tls is not None else None,
                )
        except TimeoutError:
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: no connection to {upstream.netloc} "
                f"within {timeout_s:g} s (connect timeout)",
                status=504,
                code="upstream_connect_timeout",
            ) from None
        except ssl.SSLError as error:
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: TLS with {upstream.netloc} failed: {_why(error)}"
            ) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: {upstream.netloc}: {_why(error)}"
            ) from error
        if connection.transport is None or connection.transport.is_closing():
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: {upstream.netloc} closed the connection at once"
            )
        return connection


def _why(error: OSError | UnicodeError) -> str:
    """The reason in words, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "handshake error").replace("_", " ").lower()
    if isinstance(error, OSError):
        if error.errno is not None and error.errno > 0:  # the loops put addresses and call names into `strerror`
            return os.strerror(error.errno).lower()
        if error.strerror:
            return error.strerror.lower()
    if isinstance(error, ConnectionError) and not error.args:
        return "connection reset"  # in the TLS handshake; the loops raise it without a word
    return str(error).lower() or type(error).__name__


class Transport:
    """All upstream connections of this process. `start` it inside the running loop, `close` it at the end.

    `tls` is the context for https upstreams; by default the system's trust store, with host names checked.
    """

    def __init__(self, idle_s: float = 4.0, tls: ssl.SSLContext | None = None) -> None:
        self._idle_s = idle_s
        self._pools: dict[Upstream, Pool] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tls = tls
        self._closed = False

    async def send(self, upstream: Upstream, head: bytes, body: bytes) -> Reply:
        """Send one request (`head` ends with its empty line) and wait until the client could be answered.

        Raises UpstreamUnreachable (nothing was sent), UpstreamBroken or UpstreamTimeout. Cancelled at any point, it
        leaves no connection behind. The caller closes the Reply.
        """
        pool = self._pools.get(upstream) or self._open_pool(upstream)
        connection = pool.take()
        if connection is None:
            connection = await pool.dial()
        while True:
            if self._closed:  # while it was dialled
                connection.abort()
                raise UpstreamUnreachable("the gateway is shutting down", status=503)
            reply = connection.begin(head, body)
            pool.active.add(connection)
            try:
                await reply.ready()
            except StaleConnection:
                connection = await pool.dial()  # a fresh one: it cannot be stale, so this loop turns once
                continue
            except BaseException:
                reply.close()
                raise
            return reply

    def counts(self, upstream: Upstream) -> tuple[int, int]:
        """(connections in use, idle connections) of an upstream."""
        pool = self._pools.get(upstream)
        return (len(pool.active), len(pool.idle)) if pool is not None else (0, 0)

    def start(self) -> None:
        self._sweep()

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for pool in self._pools.values():
            for connection in [*pool.active]:
                reply = connection.reply
                connection.abort()
                if reply is not None:
                    reply.fail(UpstreamBroken("the gateway is shutting down"))
            while pool.idle:
                connection = pool.idle.pop()
                connection.idle_at = 0.0
                connection.abort()

    def _open_pool(self, upstream: Upstream) -> Pool:
        tls = None
        if upstream.scheme == "https":
            tls = self._tls = self._tls or ssl.create_default_context()
        # Below the runtime's own limit, or we would write into connections that it is just closing.
        idle_s = min(self._idle_s, max(0.5, upstream.runtime.idle_s - 1.0))
        pool = self._pools[upstream] = Pool(upstream, idle_s, tls)
        return pool

    def _sweep(self) -> None:
        if self._closed:
            return
        self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        now = monotonic()
        for pool in self._pools.values():
            for connection in list(pool.active):
                reply = connection.reply
                if reply is not None and (name := reply.overdue(now)):
                    connection.expire(reply, name)
            idle = pool.idle
            while idle and now - idle[0].idle_at >= pool.idle_s:
                connection = idle.popleft()
                connection.idle_at = 0.0
                if connection.transport is not None:
                    connection.transport.abort()
