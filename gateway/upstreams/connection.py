"""Connection: one connection to an upstream, and the parser of its answers.

Framing follows RFC 9112 section 6.3: chunked, Content-Length, or until close. A truncated answer is UpstreamBroken; it
never looks like an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from time import monotonic
from typing import TYPE_CHECKING, Final

from httptools import HttpParserError, HttpResponseParser

from gateway.errors import UpstreamBroken, UpstreamGarbled, UpstreamSilent, UpstreamTimeout
from gateway.upstreams.reply import Reply, StaleConnection

if TYPE_CHECKING:
    from gateway.upstreams.transport import Pool

MAX_HEAD_BYTES: Final = 64 * 1024
#: What the kernel holds of an answer that is not read, at most twice this. Left to itself it takes many MiB, and a few
#: hundred clients that do not read bring all TCP of the host to a crawl (tcp_mem, tcp(7)).
RECEIVE_BYTES: Final = 128 * 1024


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
        with contextlib.suppress(OSError):  # it may be gone already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        # Not before there is a connection, whose loss breaks the cycle that they make.
        self._parser = HttpResponseParser(self)
        self._feed = self._parser.feed_data

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
                self._break(f"its answer is not valid HTTP/1.1: {_reason(error)}", UpstreamGarbled)
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
                self._break(f"its {what} larger than {MAX_HEAD_BYTES} bytes", UpstreamGarbled)
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
            self._break("it closed the connection without an answer", UpstreamSilent)
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

    def _break(self, reason: str, kind: type[UpstreamBroken] = UpstreamBroken) -> None:
        reply = self.reply
        self._pieces.clear()
        self.abort()
        if reply is not None:
            reply.fail(kind(f"provider {self.upstream.provider!r} failed: {reason}"))

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
