"""The head of a streamed answer waits for its first content: what fails before it, another upstream answers."""

from __future__ import annotations

import asyncio

import pytest

from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    Scripted,
    chat,
    event,
    framed,
    gateway,
    provider,
    timeouts,
)
from tests.replay import Seen

ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
WHOLE = ROLE + event("from ") + event("two") + FINISH + DONE
ERROR = b'data: {"error":{"message":"EngineDeadError","type":"InternalServerError","param":null,"code":500}}\n\n'

#: what the first upstream sends before its connection ends -> the outcome of that attempt
BEFORE = {
    "nothing but a head": (b"", "broken"),
    "a comment": (framed(b": ping\n\n"), "broken"),
    "a role": (framed(ROLE), "broken"),
    "half of the first content": (framed(ROLE + event("lost")[:-5]), "broken"),
    "an error": (framed(ERROR + DONE) + LAST_CHUNK, "stream_error"),
    "an error after the role": (framed(ROLE) + framed(ERROR + DONE) + LAST_CHUNK, "stream_error"),
    "an end at once": (LAST_CHUNK, "incomplete"),
    "an end": (framed(ROLE) + LAST_CHUNK, "incomplete"),
}


def upstreams(first: bytes, *, hang: bool = False) -> tuple[Scripted, Scripted]:
    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + first)
        await writer.drain()
        if hang:
            await reader.read()

    return Scripted(script), Scripted(answer=SSE_HEAD + framed(WHOLE) + LAST_CHUNK, keep=True)


@pytest.mark.parametrize("what", BEFORE)
async def test_what_fails_before_the_first_content_is_answered_by_another(what: str) -> None:
    sent, outcome = BEFORE[what]
    one, two = upstreams(sent)
    async with one, two, gateway(provider("one", one.url), provider("two", two.url), policy="round_robin") as here:
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert (answer.status, answer.body) == (200, WHOLE), "and nothing of the first one's"
        assert answer.header("x-gateway-upstream") == "two"
        (again,) = await here.settled(1)
        assert [(made.upstream, made.outcome) for made in again.attempts_made] == [("one", outcome), ("two", "ok")]
        assert f'gateway_attempt_failures_total{{outcome="{outcome}"}} 1.0' in await here.scrape()
        here.assert_idle()


async def test_a_role_is_no_first_byte() -> None:
    """An engine that says a role and then hangs has not begun to answer."""
    one, two = upstreams(framed(ROLE), hang=True)
    limits = timeouts(first_byte_s=0.3)
    async with (
        one,
        two,
        gateway(
            provider("one", one.url, timeouts=limits), provider("two", two.url, timeouts=limits), policy="round_robin"
        ) as here,
    ):
        assert (await here.ask("POST", CHAT, chat(stream=True))).body == WHOLE
        outcomes = [made.outcome for record in await here.settled(1) for made in record.attempts_made]
        assert outcomes == ["first_byte_timeout", "ok"]
        here.assert_idle()


async def test_a_requests_own_error_is_no_engines() -> None:
    """Some engines say so in the stream; another would say the same, and nobody is ejected for it."""
    own = b'data: {"error":{"message":"the context is too long","code":400}}\n\n'
    one, two = upstreams(framed(own + DONE) + LAST_CHUNK)
    async with one, two, gateway(provider("one", one.url), provider("two", two.url), policy="round_robin") as here:
        answers = [await here.ask("POST", CHAT, chat(stream=True)) for _ in range(2)]
        assert {answer.body for answer in answers} == {own + DONE, WHOLE}
        assert {record.attempts for record in await here.settled(2)} == {1}


async def test_a_failure_with_nobody_left_has_a_status_and_lists_the_attempts() -> None:
    one, two = upstreams(framed(ERROR + DONE) + LAST_CHUNK)[0], upstreams(framed(ROLE))[0]
    async with one, two, gateway(provider("one", one.url), provider("two", two.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.status == 502
        assert "one: stream error" in answer.error["message"]
        assert "two: broken" in answer.error["message"]
        assert here.record.outcome == "upstream_error"
        here.assert_idle()


async def test_an_ejected_upstream_shows() -> None:
    one, two = upstreams(framed(ERROR) + LAST_CHUNK)  # its probes are well: outcomes eject it
    async with one, two, gateway(provider("pool", one.url, two.url), policy="round_robin") as here:
        first, second = here.app.catalog.upstreams
        assert f'gateway_upstream_state{{provider="pool",upstream="{first.name}"}} 1.0' in await here.scrape()
        for _ in range(10):
            assert (await here.ask("POST", CHAT, chat(stream=True))).body == WHOLE
        assert len(one.seen) == 5, "then it was left alone"
        text = await here.scrape()
        assert f'gateway_upstream_state{{provider="pool",upstream="{first.name}"}} 0.0' in text
        assert f'gateway_upstream_state{{provider="pool",upstream="{second.name}"}} 1.0' in text
        assert f'gateway_upstream_ejections_total{{provider="pool",upstream="{first.name}"}} 1.0' in text
        (listed,) = (await here.ask("GET", "/api/local-llm/providers")).json()["providers"]
        assert [host["state"] for host in listed["upstreams"]] == ["open", "closed"]
