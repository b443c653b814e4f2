"""The server over real sockets: records, keep-alive, aborts, metrics, backpressure, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.sim import Engine, Pace, SimServer, demo_engine

from .conftest import MESSAGES, ask, chat, eventually, stream


def raw_chat(**fields: Any) -> bytes:
    body = json.dumps({"model": "sim", "messages": MESSAGES, "max_tokens": 4, **fields}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    return await reader.readexactly(int(length.split(b":")[1]))


async def test_same_prompt_same_answer_streamed_or_not(sim: SimServer) -> None:
    whole = json.loads((await chat(sim, max_tokens=40)).body)
    assert (await stream(sim, max_tokens=40)).text == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 40
    assert whole["choices"][0]["finish_reason"] == "length"
    other = json.loads((await chat(sim, max_tokens=40, messages=[{"role": "user", "content": "?"}])).body)
    assert other["choices"][0]["message"]["content"] != whole["choices"][0]["message"]["content"]


async def test_natural_end_without_max_tokens(sim: SimServer) -> None:
    whole = json.loads((await chat(sim, max_tokens=None)).body)
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("stop", 64)


async def test_continue_final_message_goes_on_where_the_text_broke_off(sim: SimServer) -> None:
    full = (await stream(sim, max_tokens=50)).text
    for cut in (1, 7, 60, len(full) - 1):
        reply = await stream(
            sim,
            max_tokens=50,
            messages=[*MESSAGES, {"role": "assistant", "content": full[:cut]}],
            continue_final_message=True,
            add_generation_prompt=False,
        )
        assert (full[:cut] + reply.text).startswith(full)


async def test_prefix_cache_shows_in_usage_and_metrics(sim: SimServer) -> None:
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 20}]
    cached = []
    for _ in range(2):
        usage = json.loads((await chat(sim, messages=messages)).body)["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert usage["prompt_tokens"] == 209
    assert cached == [0, 208]
    metrics = (await ask(sim, "/metrics")).body.decode()
    assert 'vllm:prefix_cache_hits_total{engine="0",model_name="sim"} 208.0' in metrics
    assert 'vllm:prompt_tokens_total{engine="0",model_name="sim"} 418.0' in metrics
    assert 'vllm:generation_tokens_total{engine="0",model_name="sim"} 16.0' in metrics
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="sim"} 2.0' in metrics
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="sim"} 2.0' in metrics
    assert 'le="+Inf",model_name="sim"} 2.0' in metrics


async def test_records_what_it_received(sim: SimServer) -> None:
    await ask(sim, "/v1/models?a=%2F&b", headers="X-Odd:  kept\r\nx-odd: twice\r\n", method="GET", body=b"")
    received = sim.requests[-1]
    assert (received.method, received.target, received.body) == ("GET", "/v1/models?a=%2F&b", b"")
    assert [pair for pair in received.headers if pair[0].lower() == "x-odd"] == [("X-Odd", "kept"), ("x-odd", "twice")]
    assert received.connection == sim.connections_total == 1
    await eventually(lambda: received.closed_at is not None)
    assert sim.connections_open == 0


async def test_keep_alive_and_pipelining(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(raw_chat(user="a") + raw_chat(user="b"))
    for _ in range(2):
        assert json.loads(await read_answer(reader))["object"] == "chat.completion"
    assert [request.json()["user"] for request in sim.requests] == ["a", "b"]
    assert sim.connections_total == 1
    writer.close()


async def test_a_request_in_tiny_pieces_and_expect_continue(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    request = raw_chat().replace(b"host: x", b"host: x\r\nexpect: 100-continue")
    head = request.index(b"\r\n\r\n") + 4
    for at in range(0, head, 7):
        writer.write(request[at : min(at + 7, head)])
        await asyncio.sleep(0)
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(request[head:])
    assert b"chat.completion" in await read_answer(reader)
    writer.close()


async def test_what_is_not_http_gets_400_and_the_door(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request")
    writer.close()


async def test_idle_connections_are_closed_after_keep_alive() -> None:
    async with SimServer(keep_alive_s=0.05) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat())
        await read_answer(reader)
        began = asyncio.get_running_loop().time()
        assert await reader.read() == b""
        assert 0.04 < asyncio.get_running_loop().time() - began < 2.0  # its default is 5
        writer.close()


@pytest.mark.parametrize("streamed", [True, False])
async def test_disconnect_frees_the_engine_at_once(streamed: bool) -> None:
    async with SimServer(engine=Engine(speed=1.0)) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat(stream=streamed, max_tokens=10_000))
        await eventually(lambda: sim.engine.generation_tokens_total >= 3)
        running = 'vllm:num_requests_running{engine="0",model_name="sim"} '
        assert running + "1.0" in (await ask(sim, "/metrics")).body.decode()
        writer.transport.abort()
        made = sim.engine.generation_tokens_total
        await eventually(lambda: sim.engine.running == 0)
        assert sim.engine.generation_tokens_total < made + 100
        assert running + "0.0" in (await ask(sim, "/metrics")).body.decode()
        assert (sim.aborted, sim.engine.kv_usage) == (1, 0.0)
        assert sim.requests[0].closed_at is not None
        assert sim.requests[0].finished_at is None
        del reader


async def test_paced_engine_streams_token_by_token() -> None:
    async with SimServer(engine=Engine(speed=1.0, pace=Pace(a=0.05, b=0, c=0.02, d=0, e=0))) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(raw_chat(stream=True, max_tokens=10))
        times = []
        while b"[DONE]" not in (line := await reader.readline()):
            if b'"content":"' in line and b"role" not in line:
                times.append(loop.time() - began)
        assert len(times) == 10
        assert times[0] >= 0.05
        assert times[-1] >= 0.05 + 9 * 0.02
        assert times[-1] - times[0] > 0.05, "not all at the end"
        writer.close()


async def test_slow_reader_holds_the_stream_back_not_the_memory(sim: SimServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port, limit=1024)
    writer.write(raw_chat(stream=True, max_tokens=30_000))
    await eventually(lambda: sim.engine.running == 0 and sim.engine.generation_tokens_total == 30_000)
    await asyncio.sleep(0.05)
    assert sim.requests[0].finished_at is None  # about 6 MB cannot all be on their way
    size = 0
    while data := await reader.read(1 << 16):
        size += len(data)
        if data.endswith(b"0\r\n\r\n"):
            break
    assert size > 6_000_000
    writer.close()


async def test_a_queue_forms_when_all_slots_are_taken() -> None:
    async with SimServer(engine=Engine(speed=1.0, max_sequences=2)) as sim:
        tasks = [asyncio.create_task(chat(sim, max_tokens=5)) for _ in range(3)]
        await eventually(lambda: (sim.engine.running, sim.engine.waiting) == (2, 1))
        assert [(await task).status for task in tasks] == [200] * 3


async def test_context_and_memory_limits_are_400() -> None:
    async with SimServer(context=50, engine=Engine(blocks=3)) as sim:
        reply = await chat(sim, messages=[{"role": "user", "content": "word " * 60}])
        assert (reply.status, reply.events) == (400, [])
        assert b"maximum context length is 50 tokens" in reply.body
        reply = await chat(sim, max_tokens=35, n=2)
        assert (reply.status, b"needs 4 KV blocks" in reply.body) == (400, True)
        assert (sim.engine.running, sim.engine.waiting) == (0, 0)


async def test_api_key_as_vllm_checks_it() -> None:
    async with SimServer(api_key="secret") as sim:
        reply = await chat(sim)
        assert (reply.status, reply.body) == (401, b'{"error":"Unauthorized"}')
        assert (await ask(sim, "/v1/models", headers="x-api-key: secret\r\n")).status == 401
        assert (await chat(sim, headers="authorization: Bearer secret\r\n")).status == 200
        assert (await ask(sim, "/health")).status == (await ask(sim, "/metrics")).status == 200


async def test_several_engines_in_one_process() -> None:
    async with SimServer(("a",)) as one, SimServer(("b",)) as other:
        assert one.url != other.url
        await chat(one)
        assert (one.engine.generation_tokens_total, other.engine.generation_tokens_total) == (8, 0)


async def test_stop_leaves_nothing_open() -> None:
    async with SimServer(engine=Engine(speed=1.0)) as sim:
        _, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat(stream=True, max_tokens=1000))
        await eventually(lambda: sim.engine.running == 1)
    assert (sim.connections_open, sim.engine.running) == (0, 0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", sim.port)
    writer.close()


async def test_demo_engine_says_what_it_is_and_can_be_seen_streaming() -> None:
    async with demo_engine() as sim:
        began = asyncio.get_running_loop().time()
        reply = await stream(sim, max_tokens=20)
        took = asyncio.get_running_loop().time() - began
        assert reply.text.startswith("This is a simulated engine, not a language model")
        assert 5 < 19 / (took - 0.05) < 45, "tokens a second"


async def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    await asyncio.to_thread(
        subprocess.run,
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context(cafile=certificate)
    ours.load_cert_chain(certificate, key)
    async with SimServer(ssl=ours) as sim:
        assert sim.url.startswith("https://127.0.0.1:")
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port, ssl=theirs)
        writer.write(raw_chat())
        assert b"chat.completion" in await read_answer(reader)
        writer.write(raw_chat(stream=True, sim={"cut_at_token": 2}))
        data = b""
        with contextlib.suppress(ssl.SSLError):  # some versions of OpenSSL take the missing goodbye for an error
            while piece := await reader.read(1 << 16):
                data += piece
        assert not data.endswith(b"0\r\n\r\n")
        assert data.count(b"data: ") == 3
        writer.transport.abort()


async def test_nothing_is_written_to_a_client_that_has_gone(sim: SimServer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(raw_chat(stream=True, max_tokens=2000))
        await reader.read(1)
        writer.transport.abort()
    await eventually(lambda: sim.connections_open == 0)
    assert caplog.text == ""
    assert sim.engine.running == 0
