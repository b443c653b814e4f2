"""Upstreams that fail: what the client hears, what it must never take for an end, and what the record says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from gateway.ledger.record import Record
from gateway.sim import SimServer
from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    Gateway,
    Scripted,
    chat,
    deaf,
    event,
    framed,
    gateway,
    provider,
    timeouts,
    whole,
)
from tests.replay import TRANSCRIPTS, Recording, Replay, Seen, load
from tests.replay import Faults as ReplayFaults

BOTH_LOOPS = True


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer() as one:
        yield one


async def read_by_sdk(here: Gateway, texts: list[str], **options: Any) -> None:
    """Stream an answer with the official client; what came before it raised is in `texts`."""
    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.key, max_retries=0) as client:
        async for chunk in await client.chat.completions.create(**chat(stream=True, **options)):
            texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]


def assert_ends_in_error(answer: Answer, code: str) -> dict[str, Any]:
    """The stream's last event is our error; no [DONE]; every event before it is whole."""
    assert answer.status == 200
    assert answer.ended, "the framing is intact"
    *_, last = answer.events  # decodes them all
    assert set(last) == {"error"}, last
    assert last["error"]["code"] == code
    assert "[DONE]" not in answer.events
    error: dict[str, Any] = last["error"]
    return error


# -- cut streams ----------------------------------------------------------------------------------------------------

BROKEN = {
    "cut at a byte": ({"cut_at_byte": 700}, "upstream_broken"),
    "cut at a token": ({"cut_at_token": 3}, "upstream_broken"),
    "reset": ({"cut_at_token": 3, "cut_with": "rst"}, "upstream_broken"),
    "ended too early": ({"clean_cut_at_token": 3}, "upstream_incomplete"),
}


@pytest.mark.parametrize("asked", [False, True], ids=["", "usage asked"])
@pytest.mark.parametrize("fault", BROKEN)
async def test_a_truncated_stream_never_looks_like_an_end(sim: SimServer, fault: str, asked: bool) -> None:
    sim.faults, code = BROKEN[fault][0] | {"token_s": 0.002}, BROKEN[fault][1]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    async with gateway(provider("one", sim.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True, **options))
        error = assert_ends_in_error(answer, code)
        assert "'one'" in error["message"]
        assert error["type"] == "upstream_error"
        record = here.record
        assert (record.status, record.outcome, record.error) == (200, "partial", code)
        assert record.estimated
        assert record.completion_tokens
        here.assert_idle()
        # by the official client it is an error, after the text that came
        texts: list[str] = []
        with pytest.raises(openai.APIError) as raised:
            await read_by_sdk(here, texts, **options)
        assert not isinstance(raised.value, openai.APIConnectionError)
        assert raised.value.code == code
        assert any(texts)


async def test_a_stream_cut_anywhere_is_an_error_to_the_official_client() -> None:
    """Wherever the upstream's bytes end, inside an event or between two, the client hears of it as an error."""
    full = event("one") + event("two \u20ac") + FINISH[:-2]
    cuts = [1, 5, 6, len(event("one")) - 1, len(event("one")), len(event("one")) + 3, len(full) - 20]
    at = 0

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + framed(full[:at]))
        await writer.drain()

    async with Scripted(script) as upstream, gateway(provider("one", upstream.url)) as here:
        for at in cuts:
            for options in ({}, {"stream_options": {"include_usage": True}}):
                with pytest.raises(openai.APIError) as raised:
                    await read_by_sdk(here, [], **options)
                assert raised.value.code == "upstream_broken", at
                # a cut before the first content is known before anything was passed on
                assert here.record.outcome == ("partial" if at >= len(event("one")) else "upstream_error"), at
        here.assert_idle()


@pytest.mark.parametrize("cut", [1, 100, 5000, 1_500_000])
async def test_a_truncated_unstreamed_answer_is_no_answer(cut: int) -> None:
    body = json.dumps({"choices": [{"message": {"content": "x" * 2_000_000}}]}).encode()

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(body)[: -len(body)] + body[:cut])
        await writer.drain()

    async with Scripted(script) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        if cut < 1_000_000:  # nothing of it had been passed on
            assert answer.status == 502
            assert answer.error["code"] == "upstream_broken"
            assert (here.record.outcome, here.record.status) == ("upstream_error", 502)
        else:
            assert answer.status == 200
            assert not answer.ended
            assert here.record.outcome == "partial"
        assert here.record.error == "upstream_broken"
        here.assert_idle()


async def test_a_missing_done_after_the_finish_is_success() -> None:
    """LiteLLM and others end without it."""
    stream = event() + FINISH
    async with (
        Scripted(answer=SSE_HEAD + framed(stream) + LAST_CHUNK) as upstream,
        gateway(provider("one", upstream.url)) as here,
    ):
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert (answer.body, answer.ended) == (stream, True)
        assert (here.record.outcome, here.record.error) == ("ok", None)


async def test_a_connection_that_closes_after_done_without_the_last_chunk() -> None:
    """The stream was whole by its own word, but not by HTTP's: the client gets every byte of it."""
    stream = event() + FINISH + DONE
    async with Scripted(answer=SSE_HEAD + framed(stream)) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.body.startswith(stream)


# -- failures that the runtimes report --------------------------------------------------------------------------


def recorded_body(name: str, heading: bytes) -> bytes:
    """The part of a transcript below `heading`: these were recorded without their heads, which were a plain 200."""
    text = (TRANSCRIPTS / f"{name}.txt").read_bytes()
    return text[text.index(b"\n", text.index(heading)) + 1 :].partition(b"### ")[0]


async def replayed(body: bytes, runtime: str, native: bool = False, **settings: Any) -> tuple[Answer, Record]:
    kind = "application/x-ndjson" if native else "text/event-stream"
    recording = Recording(SSE_HEAD.replace(b"text/event-stream", kind.encode()), body)
    path = "/api/chat" if native else CHAT
    async with (
        Replay({("POST", path): [recording]}) as replay,
        gateway(provider("one", f"{replay.url}/v1", runtime=runtime, models=["smol"]), **settings) as here,
    ):
        ours = "/api/local-llm/stream" if native else CHAT
        answer = await here.ask("POST", ours, chat("smol", stream=True))
        here.assert_idle()
        return answer, here.record


async def test_vllms_own_error_event_passes_and_is_recorded() -> None:
    body = event() + recorded_body("vllm/95-engine-dies-mid-stream", b"### vLLM")
    assert b'"error"' in body
    assert body.strip().endswith(b"data: [DONE]"), "vLLM says [DONE] after its error"
    answer, record = await replayed(body, "vllm", continue_streams=False)
    assert answer.body == body
    assert (record.outcome, record.status, record.error) == ("partial", 200, "upstream_stream_error")


async def test_litellms_own_error_event_passes_and_is_recorded() -> None:
    body = recorded_body("litellm/95-upstream-dies", b"### llama-server")
    assert b'"error"' in body
    answer, record = await replayed(body, "litellm")
    assert answer.body == body
    assert (record.outcome, record.error) == ("partial", "upstream_stream_error")


async def test_an_error_as_the_first_event_is_no_answer() -> None:
    """As vLLM's worker dies: nothing of an answer has been passed on then, so the client gets a status."""
    answer, record = await replayed(recorded_body("vllm/95-engine-dies-mid-stream", b"### vLLM"), "vllm")
    assert (answer.status, answer.error["code"]) == (502, "upstream_stream_error")
    assert (record.outcome, record.error) == ("upstream_error", "upstream_stream_error")


async def test_ollama_swallows_its_failure_and_the_gateway_does_not() -> None:
    """Over /v1 Ollama ends its stream cleanly when its runner dies: only a finish_reason is missing."""
    body = recorded_body("ollama/95-runner-dies-mid-stream", b"### same over /v1")
    assert b"data: {" in body
    assert b"[DONE]" not in body
    assert b"error" not in body
    answer, record = await replayed(body, "ollama")
    assert answer.body.startswith(body)
    assert_ends_in_error(answer, "upstream_incomplete")
    assert (record.outcome, record.error) == ("partial", "upstream_incomplete")


async def test_ollamas_own_error_line_passes_and_is_recorded() -> None:
    body = recorded_body("ollama/95-runner-dies-mid-stream", b"### Ollama")
    answer, record = await replayed(body, "ollama", native=True)
    assert answer.body == body
    assert json.loads(body.splitlines()[-1])["error"]
    assert (record.outcome, record.error) == ("partial", "upstream_stream_error")


async def test_a_native_stream_that_ends_too_early_gets_an_error_line() -> None:
    lines = load("ollama/o10-chat-stream")[0].body.splitlines(keepends=True)
    answer, record = await replayed(b"".join(lines[:3]), "ollama", native=True)
    assert answer.body.startswith(b"".join(lines[:3]))
    (last,) = answer.body.splitlines()[3:]
    assert set(json.loads(last)) == {"error", "retry", "prompt_eval_count", "eval_count"}
    assert isinstance(json.loads(last)["error"], str), "Ollama's family, though the route is no Ollama's"
    assert record.error == "upstream_incomplete"


async def test_the_engines_error_event_with_done_is_recorded_as_partial(sim: SimServer) -> None:
    sim.faults = {"error_event_at_token": 3, "token_s": 0.002}
    async with gateway(provider("one", sim.url), continue_streams=False) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.events[-1] == "[DONE]"
        assert "error" in answer.events[-2]
        assert (here.record.outcome, here.record.error) == ("partial", "upstream_stream_error")
        assert here.record.completion_tokens


async def test_a_replay_that_is_cut_inside_an_ndjson_line() -> None:
    recording = load("ollama/o10-chat-stream")[0]
    faults = ReplayFaults(cut_bytes=len(recording.body) // 2)
    async with (
        Replay({("POST", "/api/chat"): [recording]}, faults) as replay,
        gateway(provider("ollama", f"{replay.url}/v1", runtime="ollama", models=["smol"])) as here,
    ):
        answer = await here.ask("POST", "/api/local-llm/stream", chat("smol"))
        *_, last = [json.loads(line) for line in answer.body.splitlines()]
        assert set(last) == {"error", "retry", "prompt_eval_count", "eval_count"}
        assert isinstance(last["error"], str)
        assert here.record.outcome == "partial"


# -- timeouts ---------------------------------------------------------------------------------------------------

#: far below the defaults, and room for a busy machine; how exact the deadlines are is tested with the transport
LATE_S = 0.8

SLOW: dict[str, tuple[dict[str, Any], dict[str, float], str]] = {
    "silent": ({"silent": True}, {"first_byte_s": 0.3}, "upstream_first_byte_timeout"),
    "headers only": ({"first_token_s": 9.0}, {"first_byte_s": 0.3}, "upstream_first_byte_timeout"),
    "total": ({"silent": True}, {"total_s": 0.3}, "upstream_total_timeout"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("what", SLOW)
async def test_before_the_first_byte_a_timeout_is_504(sim: SimServer, what: str, stream: bool) -> None:
    faults, limits, code = SLOW[what]
    sim.faults = faults
    loop = asyncio.get_running_loop()
    async with gateway(provider("one", sim.url, timeouts=timeouts(**limits))) as here:
        began_at = loop.time()
        answer = await here.ask("POST", CHAT, chat(stream=stream))
        taken_s = loop.time() - began_at
        assert answer.status == 504
        assert answer.error["code"] == code
        assert 0.3 <= taken_s < 0.3 + LATE_S
        assert (here.record.outcome, here.record.status, here.record.error) == ("upstream_error", 504, code)
        await until_gone(sim)
        here.assert_idle()


async def until_gone(sim: SimServer) -> None:
    for _ in range(100):
        if all(one.closed_at for one in sim.requests if one.method == "POST"):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the upstream's connection is still open")


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_a_connection_that_does_not_come_is_504() -> None:
    loop = asyncio.get_running_loop()
    with deaf() as port:
        one = provider("one", f"http://127.0.0.1:{port}/v1", timeouts=timeouts(connect_s=0.3))
        async with gateway(one) as here:
            began_at = loop.time()
            answer = await here.ask("POST", CHAT, chat())
            assert 0.3 <= loop.time() - began_at < 0.3 + LATE_S
            assert answer.status == 504
            assert answer.error["code"] == "upstream_connect_timeout"
            assert "'one'" in answer.error["message"]
            here.assert_idle()


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"idle_s": 0.3}, "upstream_idle_timeout"), ({"total_s": 0.3}, "upstream_total_timeout")],
    ids=["idle", "total"],
)
async def test_after_the_first_byte_a_timeout_is_an_error_event(
    sim: SimServer, limits: dict[str, float], code: str
) -> None:
    sim.faults = {"stall_at_token": 6}
    loop = asyncio.get_running_loop()
    async with gateway(provider("one", sim.url, timeouts=timeouts(**limits))) as here:
        began_at = loop.time()
        answer = await here.ask("POST", CHAT, chat(stream=True))
        taken_s = loop.time() - began_at
        assert_ends_in_error(answer, code)
        assert 0.3 <= taken_s < 0.3 + LATE_S
        assert (here.record.outcome, here.record.error) == ("partial", code)
        await until_gone(sim)
        here.assert_idle()


async def test_comments_are_no_sign_of_life(sim: SimServer) -> None:
    """llama-server's pings go on while its model hangs: they pass, and the idle timeout runs on."""
    sim.faults = {"stall_at_token": 6, "ping_s": 0.05}
    async with gateway(provider("one", sim.url, timeouts=timeouts(idle_s=0.4))) as here:
        async with asyncio.timeout(5):
            answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.body.count(b":\n\n") >= 3
        assert b'"upstream_idle_timeout"' in answer.body
        assert here.record.error == "upstream_idle_timeout"


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_an_event_behind_a_comment_is_one() -> None:
    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + framed(event()))
        for _ in range(8):
            await asyncio.sleep(0.08)
            writer.write(framed(b": busy\n\n" + event()))
        writer.write(framed(FINISH + DONE) + LAST_CHUNK)
        await writer.drain()

    async with (
        Scripted(script) as upstream,
        gateway(provider("one", upstream.url, timeouts=timeouts(idle_s=0.3))) as here,
    ):
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.body.endswith(DONE)
        assert here.record.completion_tokens == 9


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_a_slow_but_steady_stream_is_not_cut(sim: SimServer) -> None:
    sim.faults = {"token_s": 0.05}
    async with gateway(provider("one", sim.url, timeouts=timeouts(idle_s=0.4, first_byte_s=0.4))) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True, max_tokens=14))
        assert answer.events[-1] == "[DONE]"
        assert here.record.outcome == "ok"


# -- refused, gone, garbage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Bad: a\x01b\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Bad: a\x7fb\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nBad Name: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Giant: " + b"g" * 2_000_000 + b"\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
    ids=[
        "nothing", "ssh", "no status", "length", "chunk size", "upgrade", "control", "delete", "name", "giant",
        "many", "two lengths", "length and chunks",
    ],
)  # fmt: skip
async def test_an_upstream_that_speaks_no_http_is_502(raw: bytes) -> None:
    async with Scripted(answer=raw) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 502
        assert answer.error["type"] == "upstream_error"
        assert (here.record.outcome, here.record.status) == ("upstream_error", 502)
        assert (await here.ask("GET", "/livez", key=None)).status == 200, "the process lives"
        here.assert_idle()
        assert here.app.catalog.upstreams[0].failed == (1 if raw else here.app.dispatcher.attempts)


@pytest.mark.parametrize("kind", ["control", "giant", "smuggle"])
async def test_the_engines_hostile_headers_are_502(sim: SimServer, kind: str) -> None:
    sim.faults = {"bad_headers": kind}
    async with gateway(provider("one", sim.url)) as here:
        for stream in (False, True):
            answer = await here.ask("POST", CHAT, chat(stream=stream))
            assert answer.status == 502
            assert answer.error
        sim.faults = {}
        assert (await here.ask("POST", CHAT, chat())).status == 200


@pytest.mark.parametrize("status", [401, 403])
async def test_the_upstreams_word_about_our_credential_is_not_the_clients(sim: SimServer, status: int) -> None:
    sim.faults = {"status": status}
    async with gateway(provider("one", sim.url, api_key="sk-upstream")) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 502
        assert answer.error["code"] == "upstream_auth_failed"
        assert "apiKey" in answer.error["message"]


async def test_redirects_are_not_followed(sim: SimServer) -> None:
    moved = whole(b"moved", "text/plain", "307 Temporary Redirect", f"Location: {sim.url}/chat/completions\r\n")
    async with Scripted(answer=moved) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 502
        assert answer.header("Location") is None
        assert not [one for one in sim.requests if one.method == "POST"]
