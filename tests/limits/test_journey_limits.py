"""Limits through the whole gateway: what clients see, and what is settled however a request ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Model, Price, Secret
from gateway.limits.spec import Budget
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider, until
from tests.limits.requests import requests, slots, tokens
from tests.store_fixtures import Server


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer() as one:
        yield one


def shared(server: Server) -> dict[str, Any]:
    return {"store": "auto", "redis_url": Secret(server.url)}


def level(here: Gateway, name: str) -> int:
    """What is left of a limit, in whole units."""
    (bucket,) = [one for one in here.app.limiter._buckets.values() if one.name == name]
    known = bucket.share.level if bucket.share is not None else bucket.level + bucket.loan - bucket.owed
    return known // bucket.unit


async def test_headers_and_the_429(sim: SimServer, store_server: Server) -> None:
    limits = (requests(2, 0.1), tokens(10_000, 100.0, scope="key_model"))
    async with gateway(provider("one", sim.url), limits=limits, **shared(store_server)) as here:
        for left, stream in ((1, False), (0, True)):
            answer = await here.ask("POST", CHAT, chat(max_tokens=50, stream=stream))
            assert answer.status == 200
            assert answer.header("x-ratelimit-limit-requests") == "2"
            assert answer.header("x-ratelimit-remaining-requests") == str(left)
            assert answer.header("x-ratelimit-reset-requests") in ("10s", "20s")
            assert answer.header("x-ratelimit-limit-tokens") == "10000"
            assert 9_800 <= int(answer.header("x-ratelimit-remaining-tokens") or 0) < 10_000
            assert answer.header("x-ratelimit-reset-tokens") in ("1s", "2s")
        served = len(sim.requests)
        answer = await here.ask("POST", CHAT, chat(max_tokens=50))
        _is_429(answer, "limit 'r' (scope key) reached: 2/2 requests used; it will pass in ")
        assert answer.header("x-ratelimit-remaining-requests") == "0"
        assert len(sim.requests) == served, "a refused request reaches nobody"
        text = await here.scrape()
        assert 'gateway_limit_refused_total{limit="r",scope="key"} 1.0' in text
        assert f'gateway_requests_total{{route="{CHAT}",status="429"}} 1.0' in text
        assert "gateway_limits_degraded 0.0" in text
        here.assert_idle()


def _is_429(answer: Answer, message: str) -> None:
    assert answer.status == 429
    assert answer.error["code"] == "rate_limit_exceeded"
    assert message in answer.error["message"]
    assert int(answer.header("Retry-After") or 0) >= 1
    milliseconds = int(answer.header("retry-after-ms") or 0)
    assert 0 < milliseconds <= 1000 * int(answer.header("Retry-After") or 0)


async def test_requests_for_no_model_are_limited_too_but_probes_are_not(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url), limits=(requests(3), tokens(1))) as here:
        statuses = [(await here.ask("GET", "/v1/models")).status for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert (await here.ask("GET", "/readyz")).status == 200


async def test_observe_only_counts(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url), limits=(requests(1, observe=True),)) as here:
        for _ in range(3):
            assert (await here.ask("POST", CHAT, chat())).status == 200
        assert 'gateway_limit_observed_total{limit="r"} 2.0' in await here.scrape()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_used_is_what_is_charged(sim: SimServer, store_server: Server, stream: bool) -> None:
    async with gateway(provider("one", sim.url), limits=(tokens(10_000),), **shared(store_server)) as here:
        assert (await here.ask("POST", CHAT, chat(max_tokens=20, stream=stream))).status == 200
        (record,) = await here.settled(1)
        assert record.prompt_tokens is not None
        assert record.completion_tokens is not None
        await until(lambda: level(here, "t") == 10_000 - record.prompt_tokens - record.completion_tokens)


async def test_a_missing_max_tokens_reserves_the_default(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url), limits=(tokens(1000, 1.0),)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 200
        assert answer.header("x-ratelimit-remaining-tokens") == "0"  # 1024 and the prompt: all there is
        await until(lambda: level(here, "t") > 0)


async def test_a_request_that_reaches_no_model_gets_its_tokens_back(sim: SimServer) -> None:
    url = sim.url
    async with gateway(provider("one", url), limits=(tokens(10_000), requests(10), slots(3))) as here:
        await sim.stop()
        assert (await here.ask("POST", CHAT, chat())).status == 502
        assert level(here, "t") == 10_000
        assert level(here, "r") == 9
        assert [one.in_use for one in here.app.limiter._buckets.values() if one.name == "c"] == [0]


async def test_a_client_that_leaves_pays_what_it_got_and_frees_its_slot(sim: SimServer, store_server: Server) -> None:
    sim.faults = {"token_s": 0.01}
    limits = (tokens(10_000), slots(1))
    async with gateway(provider("one", sim.url), limits=limits, **shared(store_server)) as here:
        async with here.connect() as client:
            client.send("POST", CHAT, chat(stream=True, max_tokens=5000))
            await client.head()
            await client.events(3)
            answer = await here.ask("POST", CHAT, chat())
            _is_429(answer, "limit 'c' (scope key) reached: 1/1 concurrent requests run")
            client.abort()
        records = await here.settled(2)
        (gone,) = [one for one in records if one.status == 499]
        assert gone.prompt_tokens is not None
        assert gone.completion_tokens is not None
        paid = gone.prompt_tokens + gone.completion_tokens
        await until(lambda: level(here, "t") == 10_000 - paid, what=f"{paid} paid")
        for _ in range(50):
            if (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("the slot is not free")


async def test_a_budget_in_currency(sim: SimServer, store_server: Server, tmp_path: Path) -> None:
    models = [Model("sim", "sim", price=Price(input=1000.0, output=1000.0))]
    async with gateway(provider("one", sim.url, models=models), data_dir=tmp_path, **shared(store_server)) as here:
        key, _ = await here.app.keys.create({"name": "poor", "budget": Budget(0.1, "currency", "day")})
        statuses = []
        spent = most = 0.0
        while 402 not in statuses:
            answer = await here.ask("POST", CHAT, chat(max_tokens=20), key=key)
            statuses.append(answer.status)
            assert len(statuses) < 20
            cost = here.record.cost if answer.status == 200 else None
            spent += cost or 0.0
            most = max(most, cost or 0.0)
        assert statuses[0] == 200
        assert 0.1 <= spent <= 0.1 + most
        assert answer.error["code"] == "insufficient_quota"
        assert answer.error["type"] == "insufficient_quota"
        assert answer.header("x-should-retry") == "false"
        assert "the budget of this key is spent" in answer.error["message"]


async def test_degraded_shows_in_metric_readiness_and_log(
    sim: SimServer, valkey_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(provider("one", sim.url), limits=(requests(100),), **shared(valkey_server)) as here:
        assert (await here.ask("POST", CHAT, chat())).status == 200
        valkey_server.kill()
        await until(lambda: here.app.limiter.degraded)
        assert (await here.ask("POST", CHAT, chat())).status == 200
        assert "gateway_limits_degraded 1.0" in await here.scrape()
        ready = await here.ask("GET", "/readyz")
        assert ready.status == 200
        assert b"away" in ready.body
        assert "limits are kept by this process alone" in caplog.text
        valkey_server.start()
        assert await until(lambda: not here.app.limiter.degraded) < 2.0
