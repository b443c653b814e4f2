"""One client connection: HTTP/1.1 in through httptools, bytes out exactly as told, and every way to break off."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import httptools
import orjson

from gateway.sim.faults import Faults

if TYPE_CHECKING:
    from gateway.sim.listener import Listener


class Received:
    """A request as it arrived. Times are `loop.time()`; `closed_at` is set when its connection has gone."""

    __slots__ = (
        "at",
        "body",
        "closed_at",
        "connection",
        "finished_at",
        "keep_alive",
        "method",
        "raw_headers",
        "target",
    )

    def __init__(
        self,
        method: str,
        target: str,
        raw_headers: list[tuple[bytes, bytes]],
        body: bytes,
        connection: int,
        keep_alive: bool,
        at: float,
    ) -> None:
        self.method = method
        self.target = target  # raw, undecoded
        self.raw_headers = raw_headers
        self.body = body
        self.connection = connection  # number of the connection, from 1
        self.keep_alive = keep_alive
        self.at = at
        self.finished_at: float | None = None  # the answer was handed to the transport whole
        self.closed_at: float | None = None

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Name and value pairs in the order and spelling received (latin-1)."""
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.raw_headers]

    def header(self, name: str) -> str | None:
        wanted = name.lower().encode("latin-1")
        for key, value in self.raw_headers:
            if key.lower() == wanted:
                return value.decode("latin-1")
        return None

    def json(self) -> Any:
        return orjson.loads(self.body)

    def __repr__(self) -> str:
        return f"<Received {self.method} {self.target} {len(self.body)} bytes on connection {self.connection}>"


class Connection(asyncio.Protocol):
    """Requests are answered one after the other; pipelined ones wait."""

    def __init__(self, server: Listener) -> None:
        self.server = server
        self.loop = server.loop
        self.number = 0
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self.closed = False
        self.paused = False  # the client reads slower than we write
        self.current: Received | None = None
        self.work: Any = None  # the Generation in progress: has on_writable() and on_closed()
        self._waiting: deque[Received] = deque()
        self._parser = httptools.HttpRequestParser(self)
        self._idle: asyncio.TimerHandle | None = None
        self._drip: deque[bytes] = deque()  # pieces still to be written, one for each turn of the loop
        self._after_drip: list[Any] = []
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        self.number = self.server.opened(self)
        if self.server.faults.black_hole:
            self.transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._stop_idle()
        work, self.work = self.work, None
        if work is not None:
            work.on_closed()
        self.server.lost(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.work is not None:
            self.work.on_writable()

    def data_received(self, data: bytes) -> None:
        self._stop_idle()
        if self.server.faults.black_hole:  # set while the connection was open
            self.transport.pause_reading()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # vLLM ignores the offer and answers the request
        except httptools.HttpParserError:
            body = b"Invalid HTTP request received."
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
            self.write(head % len(body) + b"connection: close\r\n\r\n" + body)
            self.cut("fin")

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", [], []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        for name, value in self._headers:
            if name.lower() == b"expect" and value.lower() == b"100-continue":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        received = Received(
            self._parser.get_method().decode("latin-1"),
            self._url.decode("latin-1"),
            self._headers,
            body,
            self.number,
            self._parser.should_keep_alive(),
            self.loop.time(),
        )
        self.server.requests.append(received)
        self.server.requests_total += 1
        if self.current is None:
            self.current = received
            self.server.answer(self, received)
        else:
            self._waiting.append(received)

    # writing

    def write(self, data: bytes, piece_bytes: int = 0) -> None:
        """Hand bytes to the transport: at once, or `piece_bytes` at a time, each in its own turn of the loop."""
        if self.transport.is_closing():  # the client has gone, though connection_lost may be yet to come
            return
        if not piece_bytes and not self._drip:
            self.transport.write(data)
            return
        idle = not self._drip
        step = piece_bytes or len(data)
        self._drip.extend(data[at : at + step] for at in range(0, len(data), step))
        if idle and self._drip:
            self.loop.call_soon(self._drop)

    def _drop(self) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(self._drip.popleft())
        if self._drip:
            self.loop.call_soon(self._drop)
            return
        waiting, self._after_drip = self._after_drip, []
        for call in waiting:
            call()

    def flushed(self, call: Any) -> None:
        """Run `call()` once the bytes written so far are with the transport."""
        if self._drip:
            self._after_drip.append(call)
        else:
            call()

    def done(self, keep_alive: bool, faults: Faults) -> None:
        """The answer is written: go on with the next request, or wait for it, or close."""
        received, self.current, self.work = self.current, None, None
        if received is not None:
            received.finished_at = self.loop.time()
        if self.closed:
            return
        if not keep_alive:
            self.flushed(self.transport.close)
            return
        if faults.close_idle_s == 0:
            self.flushed(self.transport.close)
            return
        if self._waiting:
            self.current = self._waiting.popleft()
            self.loop.call_soon(self._answer_next)
            return
        after = self.server.keep_alive_s if faults.close_idle_s is None else faults.close_idle_s
        if faults.close_idle_random_s is not None:
            after = random.uniform(0, faults.close_idle_random_s)
        if after is not None:
            self._idle = self.loop.call_later(after, self.transport.close)

    def _answer_next(self) -> None:
        if self.current is not None and not self.closed:
            self.server.answer(self, self.current)

    def cut(self, how: str) -> None:
        """End the connection once the bytes written have left: "fin", or "rst"."""
        self.flushed(self._reset if how == "rst" else self._finish)

    def _finish(self) -> None:
        # over TLS, close() would say goodbye properly; a cut connection does not
        if self.transport.get_extra_info("sslcontext") is None:
            self.transport.close()
        elif self.transport.get_write_buffer_size():
            self.loop.call_later(0.002, self._finish)
        else:
            self.transport.abort()

    def _reset(self) -> None:
        if self.closed:
            return
        if self.transport.get_write_buffer_size():
            self.loop.call_later(0.002, self._reset)
            return
        raw: socket.socket = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _stop_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
