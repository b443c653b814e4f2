"""The engine with llama.cpp's ways, beside recordings of `llama-server` b11434; and what no recording shows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.sim import Engine, SimServer

from .conftest import MESSAGES, ask, chat, eventually, stream
from .test_sim_recorded import Recording, replay, shape

RECORDED = Path(__file__).parent / "recorded_llamacpp"


def recording(name: str) -> Recording:
    return Recording(name, RECORDED)


@pytest.fixture
async def smol() -> Any:
    async with SimServer(("smol",), context=2048, runtime="llamacpp") as server:
        yield server


def names(headers: list[Any]) -> set[str]:
    found = {(one if isinstance(one, str) else one[0]).rstrip(":").lower() for one in headers}
    return found - {"connection", "keep-alive"}  # the test closes its connections


def counted(event: Any) -> Any:
    """A shape without its numbers' kinds: 13.512 ms here may be 0 there."""
    return json.loads(json.dumps(shape(event)).replace('"float"', '"int"'))


@pytest.mark.parametrize("name", ["01-health", "02-models", "10-chat", "20-completions", "40-unknown-model"])
async def test_answers_have_the_recorded_shape(smol: SimServer, name: str) -> None:
    theirs = recording(name)
    reply = await replay(smol, theirs)
    assert (reply.status, names(reply.headers)) == (200, names(theirs.headers))
    assert counted(json.loads(reply.body)) == counted(json.loads(theirs.body))


@pytest.mark.parametrize("name", ["11-chat-stream", "12-chat-stream-usage", "21-completions-stream"])
async def test_streams_have_the_recorded_chunks(smol: SimServer, name: str) -> None:
    theirs = recording(name)
    reply = await replay(smol, theirs)
    assert [counted(event) for event in reply.events] == [counted(event) for event in theirs.events]
    assert names(reply.headers) == names(theirs.headers)


async def test_n2_stream_has_the_recorded_chunks(smol: SimServer) -> None:
    theirs = recording("15-chat-n2-stream")
    reply = await replay(smol, theirs)
    for index in (0, 1):
        ours, recorded = (
            [counted(event) for event in side.events if event != "[DONE]" and event["choices"][0]["index"] == index]
            for side in (reply, theirs)
        )
        assert ours == recorded


@pytest.mark.parametrize("name", ["06-notfound", "43-missing-messages", "45-bad-param-type", "50-get-on-post-endpoint"])
async def test_errors_are_byte_for_byte_the_recorded_ones(smol: SimServer, name: str) -> None:
    theirs = recording(name)
    reply = await replay(smol, theirs)
    assert (reply.status, reply.body.decode()) == (theirs.status, theirs.body.rstrip("\n"))
    assert names(reply.headers) == names(theirs.headers)


async def test_a_prompt_that_is_too_long(smol: SimServer) -> None:
    reply = await chat(smol, messages=[{"role": "user", "content": "hello " * 10_000}])
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", 2048)
    assert f"request ({error['n_prompt_tokens']} tokens) exceeds" in error["message"]


async def read_head(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\r\n\r\n")).decode().lower()


async def send(server: SimServer, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 8, **fields}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return reader, writer


async def test_a_stream_ends_the_connection_it_promised_to_keep(smol: SimServer) -> None:
    reader, writer = await send(smol, stream=True)
    assert "keep-alive: timeout=5, max=100\r\n" in await read_head(reader)
    assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()
    reader, writer = await send(smol)
    head = await read_head(reader)
    assert "keep-alive: timeout=5" in head
    assert smol.connections_open == 1
    writer.close()


async def test_an_error_ends_the_connection_and_says_so(smol: SimServer) -> None:
    reader, writer = await send(smol, messages=None)
    assert "connection: close\r\n" in await read_head(reader)
    assert b"'messages' is required" in await reader.read()
    writer.close()


async def test_without_a_free_slot_there_is_no_head() -> None:
    async with SimServer(engine=Engine(max_sequences=1), runtime="llamacpp") as sim:
        slow, slow_writer = await send(sim, stream=True, max_tokens=1000, sim={"token_s": 0.01})
        await read_head(slow)
        reader, writer = await send(sim, stream=True)
        waiting = asyncio.create_task(read_head(reader))
        await eventually(lambda: sim.engine.waiting == 1)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert json.loads((await ask(sim, "/props")).body)["total_slots"] == 1
        assert [slot["is_processing"] for slot in json.loads((await ask(sim, "/slots")).body)] == [True]
        page = (await ask(sim, "/metrics")).body.decode()
        assert "llamacpp:requests_processing 1\n" in page
        assert "llamacpp:requests_deferred 1\n" in page
        slow_writer.close()
        assert "200 ok" in await waiting
        writer.close()


async def test_while_it_loads_it_says_so_to_everything() -> None:
    async with SimServer(runtime="llamacpp", start_delay_s=1.5) as sim:
        for path in ("/health", "/v1/models"):
            reply = await ask(sim, path)
            loading = {"message": "Loading model", "type": "unavailable_error", "code": 503}
            assert (reply.status, json.loads(reply.body)["error"]) == (503, loading)
        assert (await chat(sim)).status == 503
        loop = asyncio.get_running_loop()
        ready_at = loop.time() + 10
        while (await ask(sim, "/health")).status != 200:
            assert loop.time() < ready_at
            await asyncio.sleep(0.05)
        assert (await chat(sim)).status == 200


async def test_a_final_assistant_message_is_continued_unasked(smol: SimServer) -> None:
    full = (await stream(smol, max_tokens=50)).text
    messages = [*MESSAGES, {"role": "assistant", "content": full[:60]}]
    rest = (await stream(smol, max_tokens=50, messages=messages)).text
    assert (full[:60] + rest).startswith(full)
    whole = json.loads((await chat(smol, max_tokens=50, messages=messages)).body)
    assert whole["choices"][0]["message"]["content"] == full[:60] + rest  # unstreamed it repeats the beginning
