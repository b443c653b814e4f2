"""The mock runtime: an OpenAI-compatible server on a raw asyncio.Protocol, as cheap as Python makes one.

    python -m tests.bench.mock PORT

Answers `/v1/models`, `/health` and `POST /v1/chat/completions`. One write per event; an interval of 0 ms
sends an event per turn of the event loop, as fast as the reader takes them.
"""

import asyncio
import os
import re
import sys
from functools import lru_cache

import httptools
import uvloop

from . import answers, machine

_JSON = b"application/json"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _answer(status: bytes, body: bytes, content_type: bytes = _JSON) -> bytes:
    head = b"HTTP/1.1 %b\r\nserver: mock\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


_COMPLETION = _answer(b"200 OK", answers.completion())
_MODELS = _answer(b"200 OK", answers.models())
_HEALTH = _answer(b"200 OK", b"", b"text/plain")
_NOT_FOUND = _answer(b"404 Not Found", b'{"error":{"message":"not found","type":"invalid_request_error","code":404}}')
_BAD = _answer(b"400 Bad Request", b'{"error":{"message":"no mock-NxMS in user","type":"BadRequestError","code":400}}')


@lru_cache(maxsize=64)
def _writes(tokens: int, usage: bool) -> list[bytes]:
    """What goes on the wire for one stream: the head with the first event, then one chunk per event."""
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in answers.events(tokens, usage=usage)]
    chunks[0] = _STREAM_HEAD + chunks[0]
    chunks[-1] += b"0\r\n\r\n"
    return chunks


# What one connection reads is used up before another reads, so all share a buffer: no allocation per read.
_BUFFER = bytearray(1 << 20)
_VIEW = memoryview(_BUFFER)
_HEAD_BYTES = 8192
_END_BYTES = 1024
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


class Runtime(asyncio.BufferedProtocol):
    """One connection; a request at a time, kept alive."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.fd = -1
        self.parser: httptools.HttpRequestParser | None = None  # only for chunked request bodies
        self.partial = b""  # of a head
        self.head = b""
        self.body = b""  # its beginning and its end; all of it when it is short
        self.missing = 0  # bytes of the body not read yet
        self.timer: asyncio.Handle | None = None
        self.writes: list[bytes] = []
        self.at = 0
        self.due = self.interval_s = 0.0
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.fd = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def get_buffer(self, sizehint: int) -> bytearray:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        if self.missing:
            self.missing -= nbytes
            if nbytes <= 2 * _END_BYTES:
                self.body += bytes(_VIEW[:nbytes])
            else:
                start = b"" if self.body else bytes(_VIEW[:_END_BYTES])
                self.body += start + bytes(_VIEW[nbytes - _END_BYTES : nbytes])
            if len(self.body) > 64 * _END_BYTES:
                self.body = self.body[:_END_BYTES] + self.body[-_END_BYTES:]
        elif self.parser is not None:
            self.parser.feed_data(bytes(_VIEW[:nbytes]))
            return
        else:
            data = self.partial + bytes(_VIEW[: min(nbytes, _HEAD_BYTES)])
            read = len(self.partial) + nbytes
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self.partial = data
                return
            self.partial, self.head, self.body = b"", data[:end], data[end:]
            if _CHUNKED.search(self.head):
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(data + bytes(_VIEW[len(data) : nbytes]))
                return
            length = _LENGTH.search(self.head)
            self.missing = int(length[1]) + end - read if length else 0
            if read > len(data):
                self.body += bytes(_VIEW[max(len(data), nbytes - _END_BYTES) : nbytes])
        if not self.missing:
            self.answer()
        elif self.missing < 0:
            self.transport.abort()  # pipelined, or longer than it said

    def on_message_begin(self) -> None:
        self.body = b""

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.parser = None
        self.answer()

    def answer(self) -> None:
        if b"/chat/completions " not in self.head[:100]:
            url = self.head.split(b" ", 2)[1]
            self.transport.write({b"/v1/models": _MODELS, b"/health": _HEALTH}.get(url, _NOT_FOUND))
            return
        asked = answers.asked(self.body)
        if asked is None:
            self.transport.write(_BAD)
        elif asked[0]:
            self.start_stream(_writes(asked[2], asked[1]), asked[3] / 1000)
        else:
            self.send(_COMPLETION)

    def send(self, data: bytes) -> None:
        """Send now: uvloop would gather the answers of one turn, and the contestant would wait for all of them."""
        try:
            sent = os.write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:  # the peer is gone; connection_lost follows
            return
        if sent < len(data):
            self.transport.write(data[sent:])

    def start_stream(self, writes: list[bytes], interval_s: float) -> None:
        self.writes, self.at, self.interval_s = writes, 1, interval_s
        self.due = self.loop.time()
        self.transport.write(writes[0])
        self.schedule()

    def schedule(self) -> None:
        if self.interval_s:
            self.due += self.interval_s  # from the start of the stream, so that a late event does not delay the rest
            self.timer = self.loop.call_at(self.due, self.tick)
        elif not self.paused:
            self.timer = self.loop.call_soon(self.tick)
        else:
            self.timer = None

    def tick(self) -> None:
        writes, at = self.writes, self.at
        self.transport.write(writes[at])
        self.at = at = at + 1
        if at < len(writes):
            self.schedule()
        else:
            self.timer = None

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.timer is None and self.at < len(self.writes):
            self.schedule()


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Runtime, machine.LOOPBACK, port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
