"""Every fault, seen from a bare socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.sim import Faults, SimServer
from gateway.sim.faults import NONE, parse_pairs

from .conftest import MESSAGES, Reply, ask, chat, eventually, stream
from .test_sim_server import raw_chat, read_answer


def test_pairs_are_json_or_text() -> None:
    assert parse_pairs("cut_at_byte=10; silent;cut_with=rst ; token_s=0.5;") == {
        "cut_at_byte": 10,
        "silent": True,
        "cut_with": "rst",
        "token_s": 0.5,
    }


@pytest.mark.parametrize("bad", [{"no_such": 1}, {"cut_at_byte": "x"}, {"cut_with": "axe"}])
def test_unknown_faults_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="faults: "):
        NONE.merged(bad)


async def test_a_request_may_ask_in_its_body_or_header(sim: SimServer) -> None:
    assert (await chat(sim, faults={"status": 418})).status == 418
    assert (await chat(sim, headers="x-sim-fault: status=418\r\n")).status == 418
    assert (await chat(sim, faults={"no_such": 1})).status == 400
    assert (await chat(sim, headers="x-sim-fault: no_such=1\r\n")).status == 400
    assert (await chat(sim)).status == 200


async def test_server_faults_cover_posts_or_paths_and_can_run_out(sim: SimServer) -> None:
    sim.faults = {"status": 503, "retry_after": 2, "times": 1}
    assert (await ask(sim, "/health")).status == 200
    reply = await chat(sim)
    assert (reply.status, reply.header("retry-after")) == (503, "2")
    assert json.loads(reply.body)["error"]["code"] == 503
    assert (await chat(sim)).status == 200
    sim.faults = Faults(status=503, paths=["/"])
    assert (await ask(sim, "/health")).status == (await ask(sim, "/v1/models")).status == 503
    sim.faults = {}
    assert (await ask(sim, "/health")).status == 200


async def test_silent_and_black_hole(sim: SimServer) -> None:
    with pytest.raises(TimeoutError):
        await chat_within(sim, 0.1, {"silent": True})
    assert sim.requests_total == 1
    sim.faults = {"black_hole": True}
    with pytest.raises(TimeoutError):
        await chat_within(sim, 0.1, {})
    assert sim.requests_total == 1


async def chat_within(sim: SimServer, timeout_s: float, faults: dict[str, Any]) -> Reply:
    body = {"messages": MESSAGES, "sim": faults}
    return await ask(sim, "/v1/chat/completions", body, timeout_s=timeout_s)


async def test_delays(sim: SimServer) -> None:
    loop = asyncio.get_running_loop()
    for faults, least_s in (
        ({"slow_headers_s": 0.08}, 0.08),
        ({"first_token_s": 0.08}, 0.08),
        ({"token_s": 0.02}, 7 * 0.02),
    ):
        began = loop.time()
        assert len((await stream(sim, faults=faults)).events) == 10
        assert least_s <= loop.time() - began < least_s + 2.0
    began = loop.time()
    assert (await chat(sim, headers="x-sim-fault: slow_headers_s=0.08\r\n")).status == 200
    assert loop.time() - began >= 0.08


async def test_first_token_delay_comes_after_the_headers(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(raw_chat(stream=True, sim={"first_token_s": 5.0}))
    async with asyncio.timeout(1.0):
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    assert sim.engine.running == 1  # it holds its slot meanwhile
    writer.transport.abort()
    await eventually(lambda: sim.engine.running == 0)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("at", [0, 1, 300])
async def test_cut_at_byte(sim: SimServer, how: str, streamed: bool, at: int) -> None:
    whole = await chat(sim, stream=streamed)
    reply = await chat(sim, stream=streamed, faults={"cut_at_byte": at, "cut_with": how})
    assert reply.status == 200
    assert reply.reset == (how == "rst")
    body = b"".join(reply.chunks) if streamed else reply.wire
    assert len(body) == at
    assert len(body) < len(whole.body)
    assert not reply.wire.endswith(b"0\r\n\r\n")
    await eventually(lambda: sim.engine.running == 0)
    assert sim.aborted == 0  # it was not the client


async def test_cut_at_token(sim: SimServer) -> None:
    reply = await stream(sim, faults={"cut_at_token": 3})
    assert len(reply.events) == 4  # the role chunk, three tokens
    assert reply.chunks[-1] != b""
    assert (await chat(sim, faults={"cut_at_token": 3})).status == 0  # unstreamed: no answer at all
    await eventually(lambda: sim.engine.running == 0)


async def test_clean_cut_has_no_sign_but_what_is_missing(sim: SimServer) -> None:
    reply = await stream(sim, faults={"clean_cut_at_token": 3})
    assert reply.chunks[-1] == b""
    assert len(reply.events) == 4
    assert all(event["choices"][0]["finish_reason"] is None for event in reply.events)


async def test_error_event_then_done(sim: SimServer) -> None:
    reply = await stream(sim, faults={"error_event_at_token": 3})
    assert [set(event) == {"error"} for event in reply.events[:-1]] == [False] * 4 + [True]
    assert (reply.events[-1], reply.chunks[-1]) == ("[DONE]", b"")
    reply = await chat(sim, faults={"error_event_at_token": 3})
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (500, "InternalServerError")


async def drain(reader: asyncio.StreamReader, into: bytearray) -> None:
    while piece := await reader.read(1 << 16):
        into += piece


async def test_stall_with_and_without_pings(sim: SimServer) -> None:
    for faults, pings in (({}, 0), ({"ping_s": 0.03}, 3)):
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat(stream=True, max_tokens=20, sim={"stall_at_token": 2, **faults}))
        data = bytearray()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(drain(reader, data), 0.14)
        assert data.count(b"data: ") == 3
        assert pings <= data.count(b":\n\n") <= pings + 1
        assert sim.engine.running == 1
        writer.transport.abort()
        await eventually(lambda: sim.engine.running == 0)
    assert sim.aborted == 2


async def test_reset(sim: SimServer) -> None:
    sim.faults = {"reset": True}
    reply = await chat(sim)
    assert (reply.status, reply.reset) == (0, True)


@pytest.mark.parametrize(
    "faults", [{"close_idle_s": 0}, {"close_idle_s": 0.05}, {"close_idle_random_s": 0.05}], ids=str
)
async def test_idle_close_comes_unannounced(sim: SimServer, faults: dict[str, Any]) -> None:
    sim.faults = faults
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"connection:" not in head.lower()
    async with asyncio.timeout(1.0):
        assert (await reader.read()).endswith(b"}]}")
    writer.close()


async def test_bad_headers(sim: SimServer) -> None:
    for kind, sign in (("control", b"x-bad: a\x01b\x7fc"), ("giant", b"x-giant: " + b"g" * (1 << 20))):
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port, limit=1 << 22)
        writer.write(raw_chat(sim={"bad_headers": kind}))
        assert sign in await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
    for streamed in (True, False):
        reply = await chat(sim, stream=streamed, faults={"bad_headers": "smuggle"})
        names = [name for name, _ in reply.headers]
        assert {"content-length", "transfer-encoding"} <= set(names)


async def test_extra_headers_and_verbatim_body(sim: SimServer) -> None:
    reply = await chat(sim, faults={"headers": [["x-litellm-model-api-base", "http://10.0.0.1"], ["x-a", "1"]]})
    assert reply.header("x-litellm-model-api-base") == "http://10.0.0.1"
    sim.faults = Faults(body=b"\xff\x00 not json", content_type="text/html", status=502)
    reply = await chat(sim)
    assert (reply.status, reply.body, reply.header("content-type")) == (502, b"\xff\x00 not json", "text/html")


async def test_framing_faults_keep_the_events(sim: SimServer) -> None:
    plain = await stream(sim)
    for faults in (
        {"chunk": 1},
        {"chunk": 7},
        {"events_per_write": 3},
        {"close_delimited": True},
        {"content_length": True},
        {"line_end": "\r\n"},
        {"line_end": "\r"},
        {"comment_every": 2},
    ):
        reply = await stream(sim, faults=faults)
        assert reply.text == plain.text, faults
        assert reply.events[-1] == "[DONE]"
        if "close_delimited" in faults:
            assert reply.header("transfer-encoding") is reply.header("content-length") is None
        elif "content_length" in faults:
            assert reply.header("content-length") == str(len(reply.wire))
        else:
            assert reply.chunks[-1] == b""
        if "line_end" in faults:
            assert reply.body.endswith(b"data: [DONE]" + 2 * faults["line_end"].encode())
        assert reply.body.count(b": comment") == (5 if "comment_every" in faults else 0)
        if "events_per_write" in faults:
            assert len(reply.chunks) == 5  # 10 events in threes, and the end


async def test_content_length_stream_with_usage_is_exact(sim: SimServer) -> None:
    for _ in range(2):
        reply = await stream(sim, stream_options={"include_usage": True}, faults={"content_length": True})
        assert reply.header("content-length") == str(len(reply.wire))
        assert reply.events[-2]["usage"]["completion_tokens"] == 8


async def test_single_bytes_arrive_singly(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(raw_chat(sim={"chunk": 1}))
    sizes = []
    while sum(sizes) < 700:
        sizes.append(len(await reader.read(1 << 16)))
    assert max(sizes) < 10
    writer.transport.abort()


async def test_big_event(sim: SimServer) -> None:
    reply = await stream(sim, faults={"big_event_bytes": 300_000})
    assert max(len(line) for line in reply.body.split(b"\n")) == 300_000
    assert reply.events[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("mode", "asked", "where"),
    [
        ("last", True, [9]),
        ("last", False, []),
        ("finish", False, [8]),
        ("after_finish", False, [9]),
        ("every", False, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("zeros", True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("litellm", True, [9]),
        ("missing", True, []),
    ],
)
async def test_usage_modes(sim: SimServer, mode: str, asked: bool, where: list[int]) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    events = (await stream(sim, faults={"usage": mode}, **options)).events
    assert [at for at, event in enumerate(events[:-1]) if event.get("usage")] == where
    if where:
        assert events[where[-1]]["usage"]["completion_tokens"] == 8
        assert events[where[-1]]["usage"]["prompt_tokens"] == 15
    if mode == "litellm":
        assert events[9]["choices"] == [{"index": 0, "delta": {}}]
    if mode == "zeros":
        assert events[3]["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


async def test_stale_connection_race_can_be_had(sim: SimServer) -> None:
    sim.faults = {"close_idle_random_s": 0.002}
    outcomes = set()
    for _ in range(40):
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat())
        await read_answer(reader)
        await asyncio.sleep(0.001)
        try:
            writer.write(raw_chat())
            outcomes.add(bool(await reader.read(100)))
        except ConnectionResetError:
            outcomes.add(False)
        writer.transport.abort()
    assert outcomes == {True, False}
