"""An engine dies in the middle of a streamed answer, and another goes on with it: the client sees one answer, the
ledger one bill.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from gateway.config import Model
from gateway.ledger import frames
from gateway.ledger.record import Record
from gateway.ledger.recovery import decode, entries, recover
from gateway.routing.breaker import Breaker
from gateway.sim import Engine, Pace, SimServer
from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    SSE_HEAD,
    USAGE,
    Answer,
    Gateway,
    Scripted,
    chat,
    event,
    framed,
    gateway,
    provider,
    timeouts,
    until,
)
from tests.limits.requests import tokens as token_limit
from tests.replay import Seen

COMPLETIONS = "/v1/completions"
TOKENS = 12


def asked(path: str, **more: Any) -> dict[str, Any]:
    if path == CHAT:
        return chat(stream=True, **more)
    return {"model": "sim", "prompt": "Once upon a time", "stream": True, **more}


@asynccontextmanager
async def fleet(*kinds: str, **settings: Any) -> AsyncIterator[tuple[Gateway, list[SimServer]]]:
    """The gateway in front of engines of these kinds, each a provider of the same model."""
    async with AsyncExitStack() as stack:
        sims = [await stack.enter_async_context(SimServer(runtime=kind)) for kind in kinds]
        providers = [
            provider(f"p{n}", sim.url, runtime=kind) for n, (sim, kind) in enumerate(zip(sims, kinds, strict=True))
        ]
        gate = await stack.enter_async_context(gateway(*providers, **settings))
        yield gate, sims


def text_of(answer: Answer) -> str:
    choices = [one["choices"][0] for one in answer.events if one != "[DONE]" and one.get("choices")]
    return "".join(choice.get("delta", choice).get("content") or choice.get("text") or "" for choice in choices)


def finish_reasons(answer: Answer) -> list[str]:
    choices = [one["choices"][0] for one in answer.events if one != "[DONE]" and one.get("choices")]
    return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


def tokens(record: Record) -> tuple[int | None, int | None]:
    return record.prompt_tokens, record.completion_tokens


def assert_seamless(answer: Answer) -> None:
    documents = [one for one in answer.events if one != "[DONE]"]
    assert len({(one["id"], one["created"], one["model"]) for one in documents}) == 1
    assert sum("role" in choice.get("delta", {}) for one in documents for choice in one["choices"]) == (
        "delta" in documents[0]["choices"][0]
    )
    assert len(finish_reasons(answer)) == 1
    assert answer.events[-1] == "[DONE]"
    assert answer.events.count("[DONE]") == 1
    assert answer.ended


FAILURES: dict[str, dict[str, Any]] = {
    "cut": {"cut_at_token": 0},
    "reset": {"cut_at_token": 0, "cut_with": "rst"},
    "clean end": {"clean_cut_at_token": 0},
    "error event": {"error_event_at_token": 0},
}


def at(failure: str, token: int) -> dict[str, Any]:
    return {name: token if value == 0 else value for name, value in FAILURES[failure].items()} | {"times": 1}


def posts(sim: SimServer) -> int:
    return sum(request.method == "POST" for request in sim.requests)


def forget_failures(gate: Gateway) -> None:
    for upstream in gate.app.catalog.upstreams:
        upstream.breaker = Breaker()


async def broken_once(gate: Gateway, sim: SimServer, faults: dict[str, Any], path: str, body: Any) -> Answer:
    """Ask until it was `sim` that answered, and failed as `faults` say."""
    forget_failures(gate)
    sim.faults = faults
    for _ in range(8):
        before = posts(sim)
        answer = await gate.ask("POST", path, body)
        if posts(sim) > before:
            return answer
    raise AssertionError("it was never asked")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "length", [{"max_tokens": TOKENS}, {"sim": {"tokens": TOKENS}, "max_tokens": 100}], ids=["length", "stop"]
)
async def test_at_every_token_the_answer_is_whole_and_billed_once(
    path: str, failure: str, length: dict[str, Any]
) -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        body = asked(path, stream_options={"include_usage": True}, **length)
        whole = await gate.ask("POST", path, body)
        assert_seamless(whole)
        bill = tokens(gate.record)
        for token in range(TOKENS):
            answer = await broken_once(gate, sims[0], at(failure, token), path, body)
            assert answer.status == 200
            assert text_of(answer) == text_of(whole), token
            assert finish_reasons(answer) == finish_reasons(whole)
            assert_seamless(answer)
            record = gate.record
            assert (record.outcome, record.error, tokens(record)) == ("ok", None, bill), token
            told = answer.events[-2]["usage"]
            assert (told["prompt_tokens"], told["completion_tokens"]) == bill
            # before any of it was sent on, it was simply asked for again
            assert (record.continued, record.attempts) in ((1, 2), (0, 2) if token == 0 else (1, 2))
        gate.assert_idle()
        assert sum(map(posts, sims)) == len(gate.records) + TOKENS


@pytest.mark.parametrize("kinds", [("llamacpp", "llamacpp"), ("vllm", "llamacpp"), ("llamacpp", "vllm")])
@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["unasked", "asked"])
async def test_between_runtimes(kinds: tuple[str, str], usage: dict[str, Any]) -> None:
    async with fleet(*kinds) as (gate, sims):
        body = asked(CHAT, max_tokens=TOKENS, **usage)
        whole = await gate.ask("POST", CHAT, body)
        bill = tokens(gate.record)
        for token in range(1, TOKENS):
            answer = await broken_once(gate, sims[0], at("cut", token), CHAT, body)
            assert text_of(answer) == text_of(whole)
            assert_seamless(answer)
            assert (gate.record.outcome, tokens(gate.record), gate.record.continued) == ("ok", bill, 1)
            told = [one["usage"] for one in answer.events if one != "[DONE]" and one.get("usage")]
            assert [(one["prompt_tokens"], one["completion_tokens"]) for one in told] == ([bill] if usage else [])


async def test_usage_in_every_chunk_goes_on_counting() -> None:
    """Where the engine reports as it goes, nothing of the bill is counted or guessed."""
    async with fleet("vllm", "vllm") as (gate, sims):
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = asked(CHAT, max_tokens=TOKENS, stream_options=options)
        await gate.ask("POST", CHAT, body)
        bill = tokens(gate.record)
        answer = await broken_once(gate, sims[0], at("cut", 5), CHAT, body)
        counts = [(one["usage"]["prompt_tokens"], one["usage"]["completion_tokens"]) for one in answer.events[:-1]]
        assert counts == [(bill[0], made) for made in (*range(TOKENS + 1), TOKENS)]
        assert (tokens(gate.record), gate.record.estimated, gate.record.continued) == (bill, False, 1)


async def test_the_local_route_too() -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        path = "/api/local-llm/stream"
        body = chat(max_tokens=TOKENS, tools=[])
        whole = text_of(await gate.ask("POST", path, body))
        answer = await broken_once(gate, sims[0], at("cut", 5), path, body)
        assert text_of(answer) == whole
        assert_seamless(answer)
        assert gate.record.continued == 1


async def test_two_engines_die_and_the_third_finishes() -> None:
    async with fleet("vllm", "vllm", "vllm") as (gate, sims):
        body = asked(CHAT, max_tokens=TOKENS, stream_options={"include_usage": True})
        whole = await gate.ask("POST", CHAT, body)
        bill = tokens(gate.record)
        for sim in sims:
            sim.faults = at("cut", 5)
        await gate.ask("POST", CHAT, body)
        for sim in sims:
            sim.faults = {}
        answer = await gate.ask("POST", CHAT, body)
        for sim in sims[:2]:
            sim.faults = at("cut", 5)
        for _ in range(6):
            answer = await gate.ask("POST", CHAT, body)
            assert text_of(answer) == text_of(whole)
            assert_seamless(answer)
            assert (gate.record.outcome, tokens(gate.record)) == ("ok", bill)
        assert max(one.continued for one in gate.records) == 2


async def test_a_hundred_engines_killed_at_a_random_moment() -> None:
    """The engines run at a pace and die as processes do: no span comes twice, none is missing."""
    chance = random.Random(7)
    async with AsyncExitStack() as stack:
        engines = [Engine(speed=1.0, pace=Pace(a=0.0, b=0.0, c=0.001, d=0.0, e=0.0)) for _ in range(3)]
        sims = [await stack.enter_async_context(SimServer(engine=engine)) for engine in engines]
        gate = await stack.enter_async_context(gateway(*(provider(f"p{n}", sim.url) for n, sim in enumerate(sims))))
        body = asked(CHAT, max_tokens=60, stream_options={"include_usage": True})
        whole = text_of(await gate.ask("POST", CHAT, body))
        bill = tokens(gate.record)
        for _ in range(100):
            forget_failures(gate)
            answering = asyncio.create_task(gate.ask("POST", CHAT, body))
            await until(lambda: any(sim.engine.running for sim in sims))
            await asyncio.sleep(chance.uniform(0.0, 0.06))
            killed = next((sim for sim in sims if sim.engine.running), None)
            if killed is not None:
                killed.kill()
            answer = await answering
            assert text_of(answer) == whole
            assert_seamless(answer)
            record = gate.record
            assert (record.outcome, record.error, record.prompt_tokens) == ("ok", None, bill[0])
            assert record.completion_tokens == bill[1]
            if killed is not None:
                await killed.revive()
        assert sum(record.continued for record in gate.records) > 50
        assert len(gate.records) == 101
        gate.assert_idle()


async def test_the_openai_client_sees_one_answer() -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        client = AsyncOpenAI(api_key=gate.key, base_url=f"{gate.url}/v1", max_retries=0)
        sims[0].faults = sims[1].faults = at("cut", 7)
        texts = []
        for _ in range(2):  # broken, twice; then undisturbed
            stream = await client.chat.completions.create(
                model="sim",
                messages=[{"role": "user", "content": "Why?"}],
                max_tokens=30,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert len({chunk.id for chunk in chunks}) == 1
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
            usage = chunks[-1].usage
            assert usage is not None
            assert usage.completion_tokens == 30
        assert texts[0] == texts[1]
        assert [record.continued for record in gate.records] == [2, 0]
        await client.close()


async def test_an_engine_that_falls_silent_is_left() -> None:
    async with (
        SimServer() as silent,
        SimServer() as other,
        gateway(
            provider("p0", silent.url, timeouts=timeouts(idle_s=0.3)),
            provider("p1", other.url),
        ) as gate,
    ):
        body = asked(CHAT, max_tokens=TOKENS)
        whole = text_of(await gate.ask("POST", CHAT, body))
        # comments that keep the connection warm are no sign of life, as llama-server's after SIGTERM
        faults = {"stall_at_token": 4, "ping_s": 0.05, "times": 1}
        answer = await broken_once(gate, silent, faults, CHAT, body)
        assert text_of(answer) == whole
        assert gate.record.attempts_made[0].outcome == "idle_timeout"
        gate.assert_idle()


async def test_no_request_is_sent_more_often_than_configured() -> None:
    """R6: engines that break off each time."""
    async with fleet(*["vllm"] * 5) as (gate, sims):
        for sim in sims:
            sim.faults = {"cut_at_token": 2}
        assert_error(await gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS)))
        assert gate.record.attempts == sum(map(posts, sims)) == 4


async def test_engines_that_fell_silent_are_not_waited_for_again() -> None:
    async with SimServer() as one, SimServer() as other:
        providers = [provider(f"p{n}", sim.url, timeouts=timeouts(idle_s=0.3)) for n, sim in enumerate((one, other))]
        async with gateway(*providers) as gate:
            one.faults = other.faults = {"stall_at_token": 4}
            assert_error(await gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS)), "upstream_idle_timeout")
            assert (posts(one), posts(other)) == (1, 1)


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside one that cannot go on"])
async def test_of_an_engine_that_nobody_could_follow_nothing_is_kept(others: int) -> None:
    """It would not be back so soon; and what is kept costs as much as relaying it."""
    unable = [Model("sim", "sim", continues=False)]
    async with SimServer() as sim, SimServer() as other:
        more = [provider("p1", other.url, models=unable)] * others
        async with gateway(provider("p0", sim.url), *more) as gate:
            assert_error(await broken_once(gate, sim, at("cut", 5), CHAT, asked(CHAT, max_tokens=TOKENS)))
            assert (gate.record.continued, gate.record.attempts) == (0, 1)
            assert not any(gate.app.continuations.counts.values())


UNFIT: dict[str, dict[str, Any]] = {
    "several answers": {"n": 2},
    "a form": {"response_format": {"type": "json_object"}},
    "log probabilities": {"logprobs": True},
    "guided": {"guided_regex": "a*"},
}


@pytest.mark.parametrize("why", UNFIT)
async def test_what_cannot_be_continued_ends_in_an_error(why: str) -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        answer = await broken_once(gate, sims[0], at("cut", 5), CHAT, asked(CHAT, max_tokens=TOKENS, **UNFIT[why]))
        assert_error(answer)
        assert (gate.record.outcome, gate.record.continued) == ("partial", 0)


def assert_error(answer: Answer, code: str = "upstream_broken") -> dict[str, Any]:
    error: dict[str, Any] = answer.events[-1]["error"]
    assert "[DONE]" not in answer.events
    assert (error["code"], error["retry"]) == (code, True)
    assert error["usage"]["completion_tokens"] > 0
    assert error["usage"]["total_tokens"] == error["usage"]["prompt_tokens"] + error["usage"]["completion_tokens"]
    assert answer.ended
    return error


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


async def test_a_tool_call_that_has_begun_is_not_continued() -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        body = asked(CHAT, max_tokens=TOKENS, tools=[TOOL], sim={"tool_call": True})
        assert_error(await broken_once(gate, sims[0], at("cut", 2), CHAT, body))
        assert gate.app.continuations.counts["unfit"] == 1
        # that tools are offered does no harm as long as none is called
        body = asked(CHAT, max_tokens=TOKENS, tools=[TOOL])
        answer = await broken_once(gate, sims[0], at("cut", 2), CHAT, body)
        assert_seamless(answer)
        assert gate.record.continued == 1


async def test_nobody_left_to_go_on() -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        for sim in sims:
            sim.faults = {"error_event_at_token": 3}
        answer = await gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS))
        error = assert_error(answer, "upstream_stream_error")
        assert "EngineCore encountered an issue" in error["message"]
        assert error["usage"]["completion_tokens"] == 6
        assert text_of_events(answer.events[:-1])
        record = gate.record
        assert (record.outcome, record.continued, record.attempts) == ("partial", 1, 2)
        assert record.completion_tokens == 6
        text = await gate.scrape()
        assert 'gateway_streams_continued_total{outcome="joined"} 1.0' in text
        assert 'gateway_streams_continued_total{outcome="failed"} 1.0' in text


async def test_who_refuses_to_go_on_is_not_blamed_for_what_broke() -> None:
    async with fleet("vllm", "vllm", policy="round_robin") as (gate, sims):
        sims[1].faults = {"status": 400}
        for one in gate.app.catalog.upstreams[1:]:
            one.load.chosen_at = float("inf")  # not its turn
        sims[0].faults = {"cut_at_token": 3, "token_s": 0.05}
        answer = await gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS))
        assert "p1 answered 400 to being asked for the rest" in assert_error(answer)["message"]
        broke, refused = gate.app.catalog.upstreams
        assert (broke.failed, refused.failed) == (1, 0)
        record = gate.record
        assert [(made.upstream, made.outcome) for made in record.attempts_made] == [("p0", "broken"), ("p1", "ok")]
        assert record.ttft_s is not None
        assert record.ttft_s < 0.1, "of what the client saw, not of the refusal"
        gate.assert_idle()


async def test_answers_go_on_where_all_engines_were_replaced() -> None:
    async with fleet("vllm", "vllm") as (gate, old), SimServer(runtime="vllm") as new:
        for sim in old:
            sim.faults = {"token_s": 0.1, "cut_at_token": 4}
        asking = asyncio.create_task(gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS)))
        await until(lambda: sum(sim.engine.running for sim in old) == 1, what="an answer under way")
        gate.app.catalog.configure([provider("new", new.url, runtime="vllm")])
        assert_seamless(await asking)
        assert (gate.record.upstream, gate.record.continued) == ("new", 1)
        gate.assert_idle()


def text_of_events(events: list[Any]) -> str:
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in events)


@pytest.mark.parametrize(
    ("runtime", "continues", "joined"),
    [("ollama", None, 0), ("openai", None, 0), ("openai", True, 1), ("vllm", False, 0)],
)
async def test_only_engines_known_to_go_on_are_asked(runtime: str, continues: bool | None, joined: int) -> None:
    models = [Model("sim", "sim", continues=continues)]
    async with (
        SimServer() as sim,
        SimServer() as other,
        gateway(
            provider("p0", sim.url, runtime=runtime, models=models),
            provider("p1", other.url, runtime=runtime, models=models),
        ) as gate,
    ):
        answer = await broken_once(gate, sim, at("cut", 5), CHAT, asked(CHAT, max_tokens=TOKENS))
        assert gate.record.continued == joined
        assert (answer.events[-1] == "[DONE]") is bool(joined)


async def test_the_journal_has_one_record_of_it(tmp_path: Path) -> None:
    async with fleet("vllm", "vllm", data_dir=tmp_path) as (gate, sims):
        body = asked(CHAT, max_tokens=TOKENS)
        await broken_once(gate, sims[0], at("cut", 5), CHAT, body)
        assert gate.app.journal is not None
        folder = gate.app.journal.folder
        await until(lambda: len(list(recover(folder))) == len(gate.records))
        ends = [decode(entry.payload) for entry in entries(folder) if entry.kind == frames.FINAL]
        assert [one.continued for one in ends if one.request_id == gate.record.request_id] == [1]
        assert Counter(one.request_id for one in ends).most_common(1)[0][1] == 1


async def test_comments_fill_the_gap() -> None:
    """Nothing on the way takes the stream for dead while the second engine reads the prompt."""
    async with (
        SimServer() as one,
        SimServer(faults={"first_token_s": 0.7}) as slow,
        gateway(provider("p0", one.url), provider("p1", slow.url), comment_s=0.2) as gate,
    ):
        answer = await broken_once(gate, one, at("cut", 4), CHAT, asked(CHAT, max_tokens=TOKENS))
        assert_seamless(answer)
        after = answer.body.partition(b": waiting\n\n")[2]
        assert answer.body.index(b": waiting") > answer.body.index(b"content")
        assert after.count(b"data: ") == TOKENS - 4 + 1
        assert gate.record.continued == 1


async def test_switched_off() -> None:
    async with fleet("vllm", "vllm", continue_streams=False) as (gate, sims):
        assert_error(await broken_once(gate, sims[0], at("cut", 5), CHAT, asked(CHAT, max_tokens=TOKENS)))


async def test_an_answer_that_lacked_only_its_end() -> None:
    """llama.cpp's last token and the chunk that says it was the last are two."""
    for lost in (FINISH + USAGE + DONE, USAGE + DONE, DONE):
        said = event(role="assistant") + event("a") + event("b") + FINISH + USAGE + DONE
        cut = said.removesuffix(lost)
        broken = SSE_HEAD + framed(cut)
        async with (
            Scripted(answer=broken) as one,
            Scripted(answer=broken) as other,
            gateway(provider("p0", one.url), provider("p1", other.url)) as gate,
        ):
            body = asked(CHAT, max_tokens=2, stream_options={"include_usage": True})
            answer = await gate.ask("POST", CHAT, body)
            assert answer.body.startswith(cut)
            assert answer.ended
            *_, finish, usage, done = answer.events
            assert finish["choices"][0]["finish_reason"] in ("length", "stop")
            assert (usage["choices"], done) == ([], "[DONE]")
            assert (gate.record.outcome, gate.record.error, gate.record.attempts) == ("ok", None, 1)
            assert usage["usage"]["completion_tokens"] == gate.record.completion_tokens
            assert gate.app.continuations.counts["completed"] == 1


async def test_reasoning_is_not_continued() -> None:
    thinks = event(choices=[{"index": 0, "delta": {"reasoning_content": "Hm"}, "finish_reason": None}])
    for said in (thinks, thinks + event("So")):
        async with (
            Scripted(answer=SSE_HEAD + framed(said)) as one,
            SimServer() as other,
            gateway(provider("p0", one.url), provider("p1", other.url)) as gate,
        ):
            for _ in range(2):
                answer = await gate.ask("POST", CHAT, asked(CHAT, max_tokens=TOKENS))
                if one.seen:
                    break
            assert_error(answer)


async def test_the_client_goes_while_nobody_answers() -> None:
    """It hangs up in the gap: the engine that was asked for the rest is left at once."""
    async with (
        SimServer() as one,
        SimServer() as other,
        gateway(provider("p0", one.url), provider("p1", other.url)) as gate,
        gate.connect() as client,
    ):
        one.faults = other.faults = {"cut_at_token": 3, "times": 1}
        client.send("POST", CHAT, asked(CHAT, max_tokens=TOKENS))
        head = await client.head()
        await client.events(4)
        for sim in (one, other):
            sim.faults = {"silent": True}
        del head
        await until(lambda: sum(map(posts, (one, other))) >= 2)
        client.reset()
        await gate.settled(1)
        assert (gate.record.outcome, gate.record.status) == ("client_gone", 499)
        gate.assert_idle()


async def test_a_client_that_reads_slowly_holds_back_the_second_engine_too() -> None:
    async with fleet("vllm", "vllm") as (gate, sims), gate.connect() as client:
        sims[0].faults = sims[1].faults = {"cut_at_token": 20, "times": 1}
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a Transport
        client.send("POST", CHAT, asked(CHAT, max_tokens=30_000))
        await until(lambda: sum(map(posts, sims)) == 3)
        await until(lambda: all(not sim.engine.running for sim in sims))
        await asyncio.sleep(0.2)
        assert not gate.records, "some 6 MB cannot all be on their way"
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.rest(await client.head())
        assert_seamless(answer)
        await gate.settled(1)
        assert gate.record.completion_tokens == 30_000


async def test_a_stop_string_after_the_seam() -> None:
    async with fleet("vllm", "vllm") as (gate, sims):
        plain = asked(CHAT, max_tokens=TOKENS, stream_options={"include_usage": True})
        words = text_of(await gate.ask("POST", CHAT, plain)).split(" ")
        body = {**plain, "stop": f"{words[5]} {words[6]}"}
        whole = await gate.ask("POST", CHAT, body)
        bill = tokens(gate.record)
        for token in range(1, 6):
            answer = await broken_once(gate, sims[0], at("cut", token), CHAT, body)
            assert (text_of(answer), finish_reasons(answer)) == (text_of(whole), ["stop"])
            assert_seamless(answer)
            assert tokens(gate.record) == bill
        gate.assert_idle()


async def test_a_stop_string_over_the_seam_ends_the_answer_there() -> None:
    """The engines see half of it each."""

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if "continue_final_message" in seen.body.decode():
            writer.write(SSE_HEAD + framed(event("OP")))
            await writer.drain()
            await reader.read()  # until the gateway leaves
        else:
            writer.write(SSE_HEAD + framed(event(" ready") + event(" ST")))

    async with (
        Scripted(script) as one,
        Scripted(script) as other,
        gateway(provider("p0", one.url), provider("p1", other.url)) as gate,
    ):
        body = asked(CHAT, max_tokens=TOKENS, stop=["STOP"], stream_options={"include_usage": True})
        answer = await gate.ask("POST", CHAT, body)
        assert text_of(answer) == " ready ST"
        assert finish_reasons(answer) == ["stop"]
        assert answer.events[-1] == "[DONE]"
        assert answer.events[-2]["usage"]["completion_tokens"] == 3
        assert gate.record.outcome == "ok"
        gate.assert_idle()


async def test_limits_settle_once_on_the_whole_answer() -> None:
    async with fleet("vllm", "vllm", limits=(token_limit(100_000, 0.001),)) as (gate, sims):
        body = asked(CHAT, max_tokens=TOKENS)
        answer = await broken_once(gate, sims[0], at("cut", 5), CHAT, body)
        assert_seamless(answer)
        used = sum((record.prompt_tokens or 0) + (record.completion_tokens or 0) for record in gate.records)
        (bucket,) = gate.app.limiter._buckets.values()
        level = bucket.share.level if bucket.share is not None else bucket.level + bucket.loan - bucket.owed
        assert 100_000 - level // bucket.unit in (used, used + 1)
