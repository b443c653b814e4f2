"""How much is read, and when: backpressure both ways, and large bodies that arrive as they were sent."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.upstreams.reply import GATHER_BYTES, READ_AHEAD_BYTES
from gateway.upstreams.upstream import Upstream
from tests.upstreams.scripted import BODY, Scripted, client, exchange, head, read, until, upstream

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b"data: " + b"x" * 4090 + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(PIECE), PIECE)
#: asyncio and uvloop read at most this much at once
ONE_READ_BYTES = 256 * 1024


class Flood:
    """A server that sends events without end, as fast as it is read."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.sent_bytes = 0
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(BODY))
            writer.write(self.start)
            while not writer.is_closing():
                writer.write(CHUNK)
                self.sent_bytes += len(PIECE)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass  # how it is meant to end: the client has enough
        finally:
            writer.transport.abort()
            self.ended.set()

    async def stuck(self) -> int:
        """Wait until nothing more can be sent; gives the bytes sent until then."""
        before = -1
        for _ in range(100):
            if before == self.sent_bytes:
                return before
            before = self.sent_bytes
            await asyncio.sleep(0.1)
        raise AssertionError("the server never stopped sending")


@asynccontextmanager
async def flood(start: bytes = STREAM) -> AsyncIterator[tuple[Flood, Upstream]]:
    one = Flood(start)
    listening = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    yield one, upstream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")
    await asyncio.wait_for(one.ended.wait(), 2)
    listening.close()
    await listening.wait_closed()


async def test_a_stream_without_a_sink_is_read_a_little_ahead_and_no_further() -> None:
    async with flood() as (server, one), client() as transport:
        reply = await transport.send(one, head(), BODY)
        stuck_at = await server.stuck()
        assert reply._buffered_bytes <= READ_AHEAD_BYTES + ONE_READ_BYTES
        assert stuck_at > reply._buffered_bytes  # the rest waits in the kernel, and behind it the server
        await asyncio.sleep(0.1)
        assert server.sent_bytes == stuck_at
        reply.close()


async def test_an_answer_that_is_no_stream_is_gathered_up_to_its_limit() -> None:
    async with flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") as (server, one), client() as transport:
        reply = await transport.send(one, head(), BODY)
        assert not reply.complete
        await server.stuck()
        assert GATHER_BYTES <= reply._buffered_bytes <= GATHER_BYTES + ONE_READ_BYTES
        reply.close()


async def test_paused_the_server_stops_sending_and_resumed_it_goes_on() -> None:
    async with flood() as (server, one), client() as transport:
        reply = await transport.send(one, head(), BODY)
        received = 0

        def sink(data: bytes) -> None:
            nonlocal received
            received += len(data)

        reply.attach(sink)
        for _ in range(2):
            target = received + 4_000_000
            await until(lambda target=target: received > target, 5.0)  # type: ignore[misc]
            reply.pause()
            paused_at = received
            stuck_at = await server.stuck()
            assert received == paused_at
            await asyncio.sleep(0.1)
            assert server.sent_bytes == stuck_at
            reply.resume()
        await until(lambda: received > stuck_at, 5.0)
        reply.close()


async def test_a_sink_that_pauses_while_it_takes_the_backlog_is_heard() -> None:
    """The read-ahead's own pause is lifted by `attach`; the client's, made in that very moment, is not."""
    async with flood() as (server, one), client() as transport:
        reply = await transport.send(one, head(), BODY)
        await server.stuck()
        calls: list[int] = []

        def sink(data: bytes) -> None:
            calls.append(len(data))
            reply.pause()

        reply.attach(sink)
        await asyncio.sleep(0.1)
        assert len(calls) == 1
        reply.resume()
        await until(lambda: len(calls) == 2)
        reply.close()


async def test_pauses_at_random_lose_and_repeat_nothing() -> None:
    dice = random.Random(20)
    body = dice.randbytes(3_000_000)
    wire = [STREAM]
    at = 0
    while at < len(body):
        size = dice.choice((1, 7, 300, 9_000, 70_000))
        part = body[at : at + size]
        wire.append(b"%x\r\n%b\r\n" % (len(part), part))
        at += size
    async with Scripted([*wire, b"0\r\n\r\n"]) as server, client() as transport:
        one = server.upstream(idle_s=0.5)
        reply = await transport.send(one, head(), BODY)
        loop = asyncio.get_running_loop()
        pieces: list[bytes] = []

        def sink(data: bytes) -> None:
            pieces.append(data)
            if dice.random() < 0.3:
                reply.pause()
                loop.call_later(dice.random() * 0.003, reply.resume)

        reply.attach(sink)
        await asyncio.wait_for(reply.ended(), 20)
        assert b"".join(pieces) == body
        assert transport.counts(one) == (0, 1)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_large_bodies_arrive_as_they_were_sent(framing: str) -> None:
    """8 MB up and 64 MB down."""
    up = random.Random(1).randbytes(8_000_000)
    block = random.Random(2).randbytes(1_000_000)
    start = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 64000000\r\n\r\n",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "close": b"HTTP/1.1 200 OK\r\n\r\n",
    }[framing]
    end: list[bytes | str] = {"length": [], "chunked": [b"0\r\n\r\n"], "close": ["close"]}[framing]  # type: ignore[assignment]
    piece = b"%x\r\n%b\r\n" % (len(block), block) if framing == "chunked" else block
    async with Scripted([start, *[piece] * 64, *end]) as server, client() as transport:  # type: ignore[list-item]
        reply = await transport.send(server.upstream(), head(len(up)), up)
        assert not reply.complete
        assert reply.head.content_length == (64_000_000 if framing == "length" else None)
        digest = hashlib.sha256()
        reply.attach(digest.update)
        await reply.ended()
        assert digest.digest() == hashlib.sha256(block * 64).digest()
        assert server.requests == [up]


async def test_one_byte_at_a_time() -> None:
    body = b"data: caf\xc3\xa9\n\n"
    script = [STREAM, *(part for byte in body for part in (b"1\r\n%c\r\n" % byte, 0.001)), b"0\r\n\r\n"]
    async with Scripted(script) as server, client() as transport:
        assert await exchange(transport, server.upstream()) == (200, body)


async def test_an_event_is_handed_on_when_it_is_read_never_gathered() -> None:
    script = [STREAM, *[b"9\r\ndata: 1\n\n\r\n", 0.03] * 5, b"0\r\n\r\n"]
    async with Scripted(script) as server, client() as transport:
        reply = await transport.send(server.upstream(), head(), BODY)
        pieces: list[bytes] = []
        reply.attach(pieces.append)
        await reply.ended()
        assert pieces == [b"data: 1\n\n"] * 5
        assert await read(reply) == b""
