"""An engine dies in the middle of a streamed answer, and another goes on with it: the client sees one answer, the
ledger one bill.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway.ledger.record import Record
from gateway.routing.breaker import Breaker
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider

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


async def broken_once(gate: Gateway, sim: SimServer, faults: dict[str, Any], path: str, body: Any) -> Answer:
    """Ask until it was `sim` that answered, and failed as `faults` say."""
    for upstream in gate.app.catalog.upstreams:
        upstream.breaker = Breaker()  # whatever it did before
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
