"""Streams that have nothing to say yet: comments while they wait, and what may follow them (S7)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from gateway.limits.spec import parse_limits
from gateway.sim import SimServer
from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    Client,
    Gateway,
    Scripted,
    Seen,
    chat,
    event,
    framed,
    gateway,
    provider,
    until,
    whole,
)

COMMENT = b": waiting\n\n"
EVERY_S = 0.1
SLOW: dict[str, Any] = {"first_token_s": 0.6}


async def waited(here: Gateway, body: dict[str, Any], path: str = CHAT, **more: Any) -> Answer:
    return await here.ask("POST", path, body, **more)


def comments(answer: Answer) -> int:
    """How many came, all before anything else; each a chunk of its own."""
    count = 0
    while answer.body[count * len(COMMENT) :].startswith(COMMENT):
        count += 1
    assert answer.body.count(COMMENT) == count
    assert answer.chunks[:count] == [COMMENT] * count
    return count


async def test_comments_while_the_prompt_is_read() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        plain = await waited(here, chat(stream=True, max_tokens=5))
        answer = await waited(here, chat(stream=True, max_tokens=5, sim=SLOW))
        assert 3 <= comments(answer) <= 6
        assert (answer.status, answer.ended) == (200, True)
        assert answer.header("content-type") == "text/event-stream; charset=utf-8"
        assert answer.header("x-request-id") == here.record.request_id
        assert answer.header("cache-control") == "no-store"
        words = [event["choices"][0]["delta"].get("content") for event in answer.events[:-1] if event["choices"]]
        expected = [event["choices"][0]["delta"].get("content") for event in plain.events[:-1] if event["choices"]]
        assert words == expected
        assert answer.events[-1] == "[DONE]"
        record = here.record
        assert (record.status, record.outcome, record.completion_tokens) == (200, "ok", 5)
        assert record.ttft_s is not None
        assert record.ttft_s >= 0.6


async def test_comments_while_it_waits_for_room_with_the_limits_in_the_head() -> None:
    limits: Any = [{"resource": "requests", "burst": 100, "per_min": 100}]
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url, max_in_flight=1), comment_s=EVERY_S, limits=parse_limits(limits)) as here,
    ):
        holder = await Client.open(here.port, here.key)
        holder.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.02}))
        await holder.head()
        task = asyncio.create_task(waited(here, chat(stream=True, max_tokens=5)))
        await asyncio.sleep(0.5)
        holder.abort()
        answer = await task
        assert comments(answer) >= 2
        assert answer.header("x-ratelimit-limit-requests") == "100"
        assert answer.events[-1] == "[DONE]"
        assert here.record.queued_s >= 0.3


async def test_a_stream_that_begins_soon_has_none_and_leaves_no_timer() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        answer = await waited(here, chat(stream=True, max_tokens=5, sim={"token_s": 0.06}))
        assert b": waiting" not in answer.body, "none after the first content either"
        await until(lambda: here.app.comments._timer is None, what="the timer gone")
        assert not here.app.comments._waiting


@pytest.mark.parametrize("body", [chat(max_tokens=3, sim=SLOW), chat(stream=False, max_tokens=3, sim=SLOW)])
async def test_who_asked_for_no_stream_gets_none(body: dict[str, Any]) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        answer = await waited(here, body)
        assert answer.json()["usage"]["completion_tokens"] == 3


async def test_lines_of_json_get_none() -> None:
    async def slow_lines(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.write(
            whole(b'{"model":"sim","message":{"content":"a"},"done":true}\n', content_type="application/x-ndjson")
        )

    async with (
        Scripted(slow_lines) as ollama,
        gateway(provider("one", ollama.url, runtime="ollama"), comment_s=EVERY_S) as here,
    ):
        answer = await waited(here, chat(), "/api/local-llm/stream")
        assert answer.header("content-type") == "application/x-ndjson"
        assert answer.body.startswith(b"{")


async def test_the_local_stream_gets_them_where_it_is_events() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        answer = await waited(here, chat(max_tokens=3, sim=SLOW), "/api/local-llm/stream")
        assert comments(answer) >= 3


async def test_switched_off() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=0.0) as here:
        answer = await waited(here, chat(stream=True, max_tokens=3, sim=SLOW))
        assert b": waiting" not in answer.body


async def test_switched_off_while_somebody_waits() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        asked = asyncio.create_task(waited(here, chat(stream=True, max_tokens=5, sim=SLOW)))
        await until(lambda: sim.engine.running == 1, what="a prompt being read")
        here.app.comments.every_s = 0.0  # as a reload does
        assert comments(await asked) <= 1


async def test_an_old_client_gets_a_stream_that_ends_with_the_connection() -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), comment_s=EVERY_S) as here,
        here.connect() as client,
    ):
        client.send("POST", CHAT, chat(stream=True, max_tokens=3, sim=SLOW), version="1.0")
        answer = await client.rest(await client.head())
        assert answer.header("transfer-encoding") is None
        assert answer.body.startswith(COMMENT * 3)
        assert answer.body.endswith(DONE)


async def test_the_connection_serves_another_request_after_it() -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), comment_s=EVERY_S) as here,
        here.connect() as client,
    ):
        for _ in range(2):
            answer = await client.ask("POST", CHAT, chat(stream=True, max_tokens=3, sim=SLOW))
            assert comments(answer) >= 3
            assert answer.events[-1] == "[DONE]"


async def test_failover_after_comments_still_works() -> None:
    async def dies_late(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)

    async with (
        Scripted(dies_late) as dying,
        SimServer() as sim,
        gateway(provider("a", dying.url), provider("b", sim.url), comment_s=EVERY_S) as here,
    ):
        answers = [await waited(here, chat(stream=True, max_tokens=5)) for _ in range(2)]
        assert len(dying.seen) >= 1, "it was asked"
        assert {answer.events[-1] for answer in answers} == {"[DONE]"}
        assert sum(b": waiting" in answer.body for answer in answers) == len(dying.seen)
        assert {one.outcome for one in here.records} == {"ok"}


async def test_what_fails_after_comments_is_an_error_event_and_no_end() -> None:
    async def dies_late(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)

    async with Scripted(dies_late) as dying, gateway(provider("one", dying.url), comment_s=EVERY_S, attempts=1) as here:
        answer = await waited(here, chat(stream=True))
        assert (answer.status, answer.ended) == (200, True)
        assert comments(answer) >= 2
        assert answer.header("connection") is None
        (error,) = answer.events
        assert error["error"]["code"] == "upstream_broken"
        assert DONE not in answer.body
        record = here.record
        assert (record.status, record.outcome, record.error) == (502, "upstream_error", "upstream_broken")


async def test_the_deadline_after_comments_is_an_error_event() -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url, max_in_flight=1), comment_s=EVERY_S, queue_s=0.5) as here,
    ):
        holder = await Client.open(here.port, here.key)
        holder.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.02}))
        await holder.head()
        answer = await waited(here, chat(stream=True))
        assert comments(answer) >= 2
        assert answer.events[-1]["error"]["code"] == "no_capacity"
        assert (here.record.status, here.record.outcome) == (503, "refused")
        with pytest.raises(APIError, match="had room"):
            await _spoken(here)
        holder.abort()


async def test_the_upstreams_own_refusal_after_comments_is_told_in_its_words() -> None:
    async def refuses_late(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        body = b'{"error": {"message": "too\\nlong", "type": "BadRequestError", "param": "messages", "code": 400}}'
        writer.write(whole(body, status="400 Bad Request"))

    async with Scripted(refuses_late) as one, gateway(provider("one", one.url), comment_s=EVERY_S) as here:
        answer = await waited(here, chat(stream=True))
        (error,) = answer.events
        expected = {"message": "too\nlong", "type": "BadRequestError", "param": "messages", "code": "upstream_refused"}
        assert error == {"error": expected}
        assert (here.record.status, here.record.error) == (400, "upstream_refused")


async def test_an_upstream_that_does_not_stream_after_comments() -> None:
    async def whole_late(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        writer.write(whole(b'{"choices": []}'))

    async with Scripted(whole_late) as one, gateway(provider("one", one.url), comment_s=EVERY_S) as here:
        answer = await waited(here, chat(stream=True))
        assert answer.events[-1]["error"]["code"] == "upstream_incomplete"


async def test_a_stream_that_came_whole_after_comments() -> None:
    async def late(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        writer.write(SSE_HEAD + framed(event("a") + FINISH + DONE) + LAST_CHUNK)

    async with Scripted(late) as one, gateway(provider("one", one.url), comment_s=EVERY_S) as here:
        answer = await waited(here, chat(stream=True))
        assert comments(answer) >= 2
        assert (answer.ended, answer.events[-1]) == (True, "[DONE]")
        assert answer.body.removeprefix(COMMENT * comments(answer)) == event("a") + FINISH + DONE


async def test_a_client_that_leaves_after_comments() -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), comment_s=EVERY_S) as here,
        here.connect() as client,
    ):
        client = await Client.open(here.port, here.key)
        client.send("POST", CHAT, chat(stream=True, sim={"first_token_s": 30.0}))
        await client.head()
        assert await client.chunk() == COMMENT
        client.leave()
        await here.settled(1)
        await until(lambda: sim.engine.running == 0, what="the engine let go")
        here.assert_idle()
        assert (here.record.status, here.record.outcome) == (499, "client_gone")
        assert not here.app.comments._waiting


async def test_the_openai_sdk_reads_over_comments() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), comment_s=EVERY_S) as here:
        assert len(await _spoken(here, sim=SLOW)) >= 4


async def _spoken(here: Gateway, **more: Any) -> list[str]:
    """The pieces of an answer, as OpenAI's client reads them."""
    async with AsyncOpenAI(base_url=here.url + "/v1", api_key=here.key, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": "?"}], stream=True, max_tokens=5, extra_body=more
        )
        pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
    return [piece for piece in pieces if piece]
