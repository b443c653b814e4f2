"""Models that stand in for others: who is asked when nobody can answer, for whom, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.config import Lookup, Model, Price
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, Scripted, chat, gateway, provider, timeouts

LOCAL = "/api/local-llm/proxy"
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}


@pytest.fixture
async def spare() -> AsyncIterator[SimServer]:
    async with SimServer(models=("small", "tiny")) as sim:
        yield sim


async def dead_url() -> str:
    """An address that refuses connections."""
    async with Scripted() as gone:
        return gone.url


def big(*fallbacks: str, **more: Any) -> Model:
    return Model("big", "big", fallbacks=fallbacks, **more)


def asked(sim: SimServer) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in sim.requests if request.method == "POST"]


async def ask(here: Gateway, model: str = "big", key: str = "", **more: Any) -> Answer:
    return await here.ask("POST", CHAT, chat(model, max_tokens=1, **more), key=here.keys[key] if key else "")


async def test_the_fallback_answers_and_is_what_is_recorded_and_charged(spare: SimServer) -> None:
    prices = {"small": Price(1.0, None, 2.0), "big": Price(1000.0, None, 1000.0)}
    one = provider("one", await dead_url(), models=[big("chat", price=prices["big"])])
    two = provider("two", spare.url, models=[Model("small", "small", aliases=("chat",), price=prices["small"])])
    async with gateway(one, two) as here:
        answer = await ask(here)
        assert answer.status == 200
        assert answer.header("x-gateway-model") == "small"
        assert [body["model"] for body in asked(spare)] == ["small"]
        record = here.record
        assert (record.model, record.model_asked, record.provider, record.attempts) == ("small", "big", "two", 1)
        assert record.cost is not None
        assert record.cost == pytest.approx((record.prompt_tokens or 0) * 1e-6 + 2e-6 * (record.completion_tokens or 0))
        stream = await ask(here, stream=True)
        assert stream.header("x-gateway-model") == "small"
        assert stream.body.endswith(b"data: [DONE]\n\n")
        assert (await ask(here, "small")).header("x-gateway-model") is None, "asked for and given"


async def test_nearest_first_then_their_own(spare: SimServer) -> None:
    dead = await dead_url()
    models = [big("middle"), Model("middle", "middle", fallbacks=("tiny",))]
    async with gateway(
        provider("one", dead, models=models), provider("two", spare.url, models=("small", "tiny"))
    ) as here:
        assert (await ask(here)).status == 200
        assert (here.record.model, here.record.attempts) == ("tiny", 1), "what probes find dead is asked last"


async def test_a_host_that_dies_under_the_request_is_left_for_the_fallback(spare: SimServer) -> None:
    async with Scripted() as dying:  # closes without an answer
        one, two = provider("one", dying.url, models=[big("small")]), provider("two", spare.url, models=("small",))
        async with gateway(one, two) as here:
            assert (await ask(here)).status == 200
            assert (here.record.model, here.record.attempts) == ("small", 2)


async def test_when_nobody_is_well_the_models_own_hosts_are_asked_first() -> None:
    one, two = (
        provider("one", await dead_url(), models=[big("small")]),
        provider("two", await dead_url(), models=("small",)),
    )
    async with gateway(one, two, attempts=2) as here:
        answer = await ask(here)
        assert answer.status == 502
        assert [attempt.upstream for attempt in here.record.attempts_made] == ["one", "two"]


async def test_a_key_gets_no_fallback_that_it_may_not_use(spare: SimServer) -> None:
    """And one that may use only the fallback cannot come to it by the other's name."""
    one = provider("one", await dead_url(), models=[big("small", "tiny")])
    limited = {"both": frozenset({"big", "tiny"}), "first": frozenset({"big"}), "second": frozenset({"small"})}
    async with gateway(one, provider("two", spare.url, models=("small", "tiny")), limited=limited) as here:
        assert (await ask(here, key="both")).status == 200
        assert here.record.model == "tiny"
        assert (await ask(here, key="first")).status == 502
        refused = await ask(here, key="second")
        assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
        assert [body["model"] for body in asked(spare)] == ["tiny"]


async def test_tools_go_only_to_fallbacks_that_have_them(spare: SimServer) -> None:
    one = provider("one", await dead_url(), models=[big("small", "tiny")])
    two = provider("two", spare.url, models=[Model("small", "small", supports_tools=False), Model("tiny", "tiny")])
    async with gateway(one, two) as here:
        assert (await ask(here, **TOOLS)).status == 200
        assert here.record.model == "tiny"
        assert asked(spare)[-1]["tools"] == TOOLS["tools"]
        assert (await ask(here)).status == 200
        assert here.record.model == "small"


async def test_tools_that_were_taken_out_are_out_for_the_fallback_too(spare: SimServer) -> None:
    """The client is told before it is known who answers."""
    one = provider("one", await dead_url(), models=[big("small", supports_tools=False)])
    async with gateway(one, provider("two", spare.url, models=("small",))) as here:
        answer = await ask(here, **TOOLS)
        assert (answer.status, answer.header("x-gateway-tools")) == (200, "removed")
        assert "tools" not in asked(spare)[-1]


async def test_a_provider_that_was_named_is_not_left(spare: SimServer) -> None:
    one = provider("one", await dead_url(), models=[big("small")])
    async with gateway(one, provider("two", spare.url, models=("small",))) as here:
        answer = await here.ask("POST", LOCAL, {**chat("big", max_tokens=1), "provider": "one"})
        assert answer.status == 502
        assert (await here.ask("POST", LOCAL, chat("big", max_tokens=1))).status == 200


async def test_while_all_hosts_are_drained_or_unknown_the_fallback_is_asked(spare: SimServer) -> None:
    nowhere = (Lookup("host", "http://nonexistent.invalid:1/v1"),)
    async with SimServer(models=("big",)) as sim:
        one = provider("one", sim.url, models=[big("small")])
        two = provider("two", spare.url, models=("small",))
        three = provider("three", models=[Model("far", "far", fallbacks=("small",))], lookups=nowhere)
        async with gateway(one, two, three) as here:
            here.app.catalog.drain([here.app.catalog.upstreams[0].identity])
            assert (await ask(here)).status == 200
            assert not asked(sim)
            assert (await ask(here, "far")).status == 200
            assert [record.model for record in here.records] == ["small", "small"]


async def test_an_upstreams_own_refusal_of_the_request_goes_to_no_fallback(spare: SimServer) -> None:
    """A 400 is about the request."""
    async with Scripted(answer=b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}") as strict:
        one = provider("one", strict.url, models=[big("small")], timeouts=timeouts(connect_s=1.0))
        async with gateway(one, provider("two", spare.url, models=("small",))) as here:
            assert (await ask(here)).status == 400
            assert not asked(spare)
