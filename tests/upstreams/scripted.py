"""A TCP server that plays a script byte for byte, and what the transport's tests share.

A script is a list of steps: bytes are sent as they are, a number is a pause in seconds, and the words below do what
they say. Each connection plays the server's script once for each request it reads; it is not an HTTP server.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Literal

from gateway.runtimes import RUNTIMES
from gateway.upstreams.reply import Reply
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Timeouts, Upstream

#: close: an orderly end; abort: a FIN, under TLS without the closure alert; reset: an RST; hang: nothing more until the
#: other side closes
Step = bytes | float | Literal["close", "abort", "reset", "hang"]
Script = Sequence[Step]

BODY = b'{"model":"m"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def head(length: int = len(BODY)) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % length


class Scripted:
    """`async with Scripted([OK]) as server:` plays the script to every request; `server.upstream()` is its address.

    `script` may also be a function of the connection's number and the request's number on it, both from 0; None from
    it closes the connection unanswered. `requests` holds every body read; `open` counts the connections that live.
    `read=False` leaves requests unread: the script plays as soon as a connection is there.
    """

    def __init__(
        self,
        script: Script | Callable[[int, int], Script | None],
        *,
        tls: ssl.SSLContext | None = None,
        read: bool = True,
    ) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0
        self._tls = tls
        self._read = read
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Scripted:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in [*self._writers]:
            writer.transport.abort()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0.01)

    def upstream(self, **timeouts: float | None) -> Upstream:
        scheme = "https" if self._tls else "http"
        return upstream(f"{scheme}://127.0.0.1:{self.port}/v1", **timeouts)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        number, self.connections = self.connections, self.connections + 1
        self.open += 1
        try:
            await self._play(reader, writer, number)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went: what several tests are about
        except asyncio.CancelledError:
            pass  # the end of the test; the stream's callback of asyncio 3.11 must not see it
        finally:
            self.open -= 1
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        turn = 0
        while True:
            if self._read:
                text = await reader.readuntil(b"\r\n\r\n")
                length = int(text.lower().partition(b"content-length:")[2].split()[0])
                self.requests.append(await reader.readexactly(length))
            script = self.script(number, turn) if callable(self.script) else self.script
            if script is None:
                return
            for step in script:
                if step == "close":
                    writer.close()
                    await writer.wait_closed()
                    return
                if step == "abort":
                    writer.transport.abort()
                    return
                if step == "reset":
                    reset(writer)
                    return
                if step == "hang":
                    while await reader.read(65536):
                        pass
                    return
                if isinstance(step, bytes):
                    if writer.is_closing():  # uvloop's transports raise where asyncio's only warn
                        return
                    writer.write(step)
                    await writer.drain()
                else:
                    assert isinstance(step, (int, float))
                    await asyncio.sleep(step)
            if not self._read:
                await reader.read()
                return
            turn += 1


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with an RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def upstream(url: str, **timeouts: float | None) -> Upstream:
    return Upstream("u", "p", RUNTIMES["vllm"], url, timeouts=Timeouts(**timeouts))  # type: ignore[arg-type]


@asynccontextmanager
async def client(tls: ssl.SSLContext | None = None, idle_s: float = 4.0) -> AsyncIterator[Transport]:
    """A started transport; closed at the end, with a moment for its sockets to go."""
    transport = Transport(idle_s, tls)
    transport.start()
    try:
        yield transport
    finally:
        transport.close()
        await asyncio.sleep(0.005)


async def read(reply: Reply) -> bytes:
    """The whole body, as the relay takes it."""
    if reply.complete:
        return reply.body()
    pieces: list[bytes] = []
    reply.attach(pieces.append)
    await reply.ended()
    return b"".join(pieces)


async def exchange(transport: Transport, one: Upstream, body: bytes = BODY) -> tuple[int, bytes]:
    """(status, body) of one request."""
    reply = await transport.send(one, head(len(body)), body)
    try:
        return reply.status, await read(reply)
    finally:
        reply.close()


async def until(condition: Callable[[], bool], within_s: float = 0.1) -> None:
    """Wait for something that must come true soon. The time is counted in turns of the loop, 2 ms each: on a busy
    machine they take longer, for the transport as for the test.
    """
    for _ in range(int(within_s / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    assert condition(), f"not within {within_s} s"


@asynccontextmanager
async def lateness() -> AsyncIterator[Callable[[], float]]:
    """By how many seconds the loop's timers were late at most, since this was entered: what a busy machine takes."""
    loop = asyncio.get_running_loop()
    worst_s = 0.0

    async def tick() -> None:
        nonlocal worst_s
        while True:
            due_at = loop.time() + 0.005
            await asyncio.sleep(0.005)
            worst_s = max(worst_s, loop.time() - due_at)

    ticking = asyncio.create_task(tick())
    try:
        yield lambda: worst_s
    finally:
        ticking.cancel()
        await asyncio.wait((ticking,))
