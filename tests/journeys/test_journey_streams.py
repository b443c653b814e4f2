"""Streams as they pass: one to one, at once, untouched in any framing, and held back by a client that does not read."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.sim import SimServer
from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    USAGE,
    Client,
    Scripted,
    chat,
    event,
    framed,
    gateway,
    provider,
    timeouts,
    until,
)
from tests.replay import Seen

BOTH_LOOPS = True

ASKED = {"stream_options": {"include_usage": True}}


class Hand:
    """An upstream stream that is written by hand, piece by piece."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter = None  # type: ignore[assignment]  # set when the request comes
        self.ready = asyncio.Event()
        self.end = asyncio.Event()

    async def __call__(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        writer.write(SSE_HEAD)
        self.ready.set()
        await self.end.wait()

    async def write(self, data: bytes) -> None:
        await self.ready.wait()
        self.writer.write(framed(data))
        await self.writer.drain()


@pytest.mark.parametrize("asked", [False, True], ids=["", "usage asked"])
async def test_each_event_arrives_before_the_next_is_sent(asked: bool) -> None:
    hand = Hand()
    waits = []
    async with Scripted(hand) as upstream, gateway(provider("one", upstream.url)) as here, here.connect() as client:
        client.send("POST", CHAT, chat(stream=True, **(ASKED if asked else {})))
        await hand.write(event("0"))
        assert (await client.head()).status == 200
        assert await client.chunk() == event("0")
        for i in range(1, 200):
            sent_at = time.perf_counter()
            await hand.write(event(str(i)))
            assert await client.chunk() == event(str(i)), "its own chunk, and no other"
            waits.append(time.perf_counter() - sent_at)
        await hand.write(FINISH)
        assert await client.chunk() == FINISH
        await hand.write(USAGE)
        if asked:
            assert await client.chunk() == USAGE
        await hand.write(DONE)
        assert await client.chunk() == DONE
        hand.writer.write(LAST_CHUNK)
        hand.end.set()
        assert await client.chunk() == b""
        await here.settled(1)
        assert (here.record.prompt_tokens, here.record.completion_tokens) == (7, 3)
        assert not here.record.estimated
    # No timer may hold events back: each would wait for it. What a busy machine holds back are some of them.
    assert sorted(waits)[len(waits) // 10] < 0.005, sorted(waits)[-5:]


async def test_the_first_event_comes_with_the_head_and_no_later() -> None:
    """vLLM's headers come long before its first token; the client hears of the answer when there is one."""
    hand = Hand()
    async with Scripted(hand) as upstream, gateway(provider("one", upstream.url)) as here, here.connect() as client:
        client.send("POST", CHAT, chat(stream=True))
        await hand.ready.wait()
        head = asyncio.create_task(client.head())
        await asyncio.sleep(0.05)
        assert not head.done()
        await hand.write(event())
        assert (await head).status == 200
        assert await client.chunk() == event()


@pytest.mark.parametrize("asked", [False, True], ids=["", "usage asked"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 3, 1000], ids=["one byte", "three bytes", "large"])
async def test_any_line_end_in_any_pieces(newline: bytes, size: int, asked: bool) -> None:
    """A byte order mark, comments, and characters cut in the middle among them."""
    parts = [b"\xef\xbb\xbf: hello\n\n", event("\u20ac\U0001f680"), b":\n\n", event("b"), FINISH]
    before = b"".join(parts).replace(b"\n", newline)
    usage, done = USAGE.replace(b"\n", newline), DONE.replace(b"\n", newline)
    stream = before + usage + done

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for i in range(0, len(stream), size):
            writer.write(framed(stream[i : i + size]))
            if i % 5 == 0:
                await writer.drain()
                await asyncio.sleep(0)
        writer.write(LAST_CHUNK)

    async with Scripted(script) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True, **(ASKED if asked else {})))
        assert answer.body == (stream if asked else before + done)
        assert answer.ended
        record = here.record
        assert (record.outcome, record.prompt_tokens, record.completion_tokens) == ("ok", 7, 3)
        assert not record.estimated


@pytest.mark.parametrize("asked", [False, True], ids=["", "usage asked"])
async def test_a_line_of_five_mebibytes(asked: bool) -> None:
    large = event("\u20ac" * (5 * 1024 * 1024 // 3))
    stream = event("a") + large + FINISH + USAGE + DONE

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + framed(stream) + LAST_CHUNK)
        await writer.drain()

    async with Scripted(script) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True, **(ASKED if asked else {})))
        assert answer.body == (stream if asked else stream.replace(USAGE, b""))
        assert (here.record.outcome, here.record.completion_tokens) == ("ok", 3)


@pytest.mark.parametrize("fault", ["chunk", "events_per_write", "close_delimited", "content_length", "comment_every"])
async def test_the_engines_framings(fault: str) -> None:
    faults: dict[str, Any] = {fault: {"chunk": 1, "events_per_write": 5, "comment_every": 2}.get(fault, True)}
    body = chat(stream=True, max_tokens=12, **ASKED)
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here:
        sim.faults = faults
        for _ in range(2):  # the second finds a kept connection, or none
            answer = await here.ask("POST", CHAT, body)
            assert answer.events[-1] == "[DONE]"
            assert here.record.outcome == "ok"
            assert here.record.completion_tokens == 12
        here.assert_idle()


# -- clients that do not read ---------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_clients_that_never_read_stop_their_upstreams() -> None:
    """Each stream would go on far beyond what sockets hold."""
    count = 50
    sent = [0] * count
    number = iter(range(count))
    piece = framed(event("x" * 8000))
    most_bytes = 12 * 1024 * 1024

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = next(number)
        writer.write(SSE_HEAD)
        while sent[own] < most_bytes:
            writer.write(piece)
            await writer.drain()
            sent[own] += len(piece)
        await asyncio.sleep(60)

    async with (
        Scripted(script) as upstream,
        gateway(provider("one", upstream.url)) as here,
        AsyncExitStack() as stack,  # uvloop does not close while a paused connection is open
    ):
        clients = [await stack.enter_async_context(here.connect()) for _ in range(count)]
        for client in clients:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a Transport
            client.send("POST", CHAT, chat(stream=True))
        before_kib = rss_kib()
        last: list[int] = []
        for _ in range(100):
            await asyncio.sleep(0.1)
            if sent == last and all(sent):
                break
            last = list(sent)
        assert sent == last, "the upstreams are still read"
        # what is on its way: the sockets' own buffers, and at most 64 KiB and one read with the gateway
        assert max(sent) < most_bytes
        held = [one for one in here.app.transport._pools.values() for one in one.active]
        assert len(held) == count
        buffered = [
            protocol.transport.get_write_buffer_size()
            for server, _ in servers(here)
            for protocol in server.connections
            if protocol.transport is not None
        ]
        assert len(buffered) == count
        assert max(buffered) < 0.6 * 1024 * 1024, max(buffered)
        assert rss_kib() - before_kib < 100 * 1024
        # one of them reads after all: its stream goes on
        clients[0].writer.transport.resume_reading()  # type: ignore[attr-defined]
        await until(lambda: sum(sent) > sum(last) + len(piece), what="the stream to go on")
        for client in clients:
            client.reset()
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        here.assert_idle()


def servers(here: Any) -> Any:
    return here.listeners._servers


def rss_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def test_a_slow_reader_gets_everything() -> None:
    body = b"".join(event(f"{i}" * 500) for i in range(3000)) + FINISH + DONE

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for i in range(0, len(body), 100_000):
            writer.write(framed(body[i : i + 100_000]))
            await writer.drain()
        writer.write(LAST_CHUNK)
        await writer.drain()

    async with Scripted(script) as upstream, gateway(provider("one", upstream.url)) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port, limit=4096)
        client = Client(reader, writer, here.key)
        client.send("POST", CHAT, chat(stream=True, **ASKED))
        got = b""
        while LAST_CHUNK not in got[-20:]:
            got += await reader.read(50_000)
            await asyncio.sleep(0.001)
        texts = got.count(b"data: ")
        assert texts == 3002
        await here.settled(1)
        assert here.record.outcome == "ok"
        assert here.record.response_bytes == len(body)
        client.abort()


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_a_paused_stream_is_not_idle() -> None:
    """While the client does not read, the upstream's silence is the gateway's own doing."""

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for _ in range(1500):
            writer.write(framed(event("x" * 8000)))
            await writer.drain()
        writer.write(framed(FINISH + DONE) + LAST_CHUNK)
        await writer.drain()

    async with (
        Scripted(script) as upstream,
        gateway(provider("one", upstream.url, timeouts=timeouts(idle_s=0.2))) as here,
        here.connect() as client,
    ):
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send("POST", CHAT, chat(stream=True))
        await asyncio.sleep(0.6)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.rest(await client.head())
        assert answer.ended
        assert answer.body.endswith(FINISH + DONE)
        assert here.record.outcome == "ok"


# -- usage ----------------------------------------------------------------------------------------------------------

WAYS = ["last", "every", "after_finish", "finish", "missing", "zeros", "litellm"]


@pytest.mark.parametrize("asked", [False, True], ids=["", "usage asked"])
@pytest.mark.parametrize("way", WAYS)
async def test_streamed_is_counted_as_unstreamed(way: str, asked: bool) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here:
        whole = (await here.ask("POST", CHAT, chat(max_tokens=17))).json()["usage"]
        unstreamed = here.record
        assert (unstreamed.prompt_tokens, unstreamed.completion_tokens) == (
            whole["prompt_tokens"],
            whole["completion_tokens"],
        )
        sim.faults = {"usage": way}
        options = ASKED if asked else {}
        answer = await here.ask("POST", CHAT, chat(stream=True, max_tokens=17, **options))
        assert answer.events[-1] == "[DONE]"
        streamed = here.record
        if way == "missing":
            assert streamed.estimated
            assert streamed.completion_tokens == pytest.approx(17, abs=1)
            assert streamed.prompt_tokens
        else:
            assert not streamed.estimated
            assert streamed.completion_tokens == unstreamed.completion_tokens == 17
            assert streamed.prompt_tokens == unstreamed.prompt_tokens
        trailing = [
            one
            for one in answer.events
            if isinstance(one, dict) and one.get("usage") and not any("finish_reason" in c for c in one["choices"])
        ]
        if way in ("last", "litellm", "after_finish"):
            assert len(trailing) == (1 if asked else 0)


async def test_the_usage_of_completions_and_embeddings() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here:
        for stream in (False, True):
            answer = await here.ask(
                "POST", "/v1/completions", {"model": "sim", "prompt": "Hello", "max_tokens": 9, "stream": stream}
            )
            assert answer.status == 200
            assert here.record.completion_tokens == 9
            assert not here.record.estimated
        answer = await here.ask("POST", "/v1/embeddings", {"model": "sim", "input": "Hello"})
        assert here.record.prompt_tokens == json.loads(answer.body)["usage"]["prompt_tokens"]
        assert here.record.completion_tokens == 0
