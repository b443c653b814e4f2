"""Estimates: learned upward, faded slowly, bounded; and what they are worth under 100 requests at once (U4, U8)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.config import Model, Price, Secret
from gateway.ledger.record import Record
from gateway.limits.estimate import OUTPUT_TOKENS, Estimates
from gateway.limits.spec import Budget, Limit
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider, until
from tests.limits.requests import tokens
from tests.store_fixtures import Server

PRICED = Model("sim", "sim", price=Price(input=1000.0, output=1000.0))


def test_answers_that_nobody_bounded() -> None:
    known = Estimates()
    assert known.output("k", "m") == OUTPUT_TOKENS
    known.learn("k", "m", 400, 100, 9000)
    assert known.output("k", "m") == 9000
    assert known.output("k", "n") == known.output("l", "m") == OUTPUT_TOKENS
    for _ in range(35):
        known.learn("k", "m", 400, 100, 10)
    assert 4000 < known.output("k", "m") < 5000
    for _ in range(200):
        known.learn("k", "m", 400, 100, 10)
    assert known.output("k", "m") == OUTPUT_TOKENS
    assert not known._outputs


def test_prompts_by_the_tokenizer_of_their_model() -> None:
    known = Estimates()
    assert known.prompt("m", 4000) == 1001
    known.learn("k", "m", 1000, 700, 1)
    assert known.prompt("m", 4000) == 2801
    assert known.prompt("n", 4000) == 1001
    known.learn("k", "m", 1_000_000, 800, 1)  # an image: its bytes are no text, and say nothing about text
    assert known.prompt("m", 4000) > 2700
    known.learn("k", "m", 10, 5000, 1)  # a prompt that the runtime has added
    assert known.prompt("m", 4000) == 4001


def test_what_is_remembered_is_bounded() -> None:
    known = Estimates()
    for number in range(30_000):
        known.learn(f"k{number}", "m", 0, 0, 5000)
    assert len(known._outputs) <= 20_000


def shared(server: Server) -> dict[str, Any]:
    return {"store": "auto", "redis_url": Secret(server.url)}


async def at_once(here: Gateway, count: int, body: dict[str, Any], key: str = "") -> list[Answer]:
    return await asyncio.gather(*(here.ask("POST", CHAT, body, key=key or here.key) for _ in range(count)))


def settled(records: list[Record], name: str) -> tuple[float, float, float]:
    """Of the requests that were admitted: the sums of what was reserved and used, and the largest error of one."""
    uses = [one for record in records for one in record.limits if one.name == name and one.source != "refused"]
    errors = [one.used - one.reserved for one in uses]
    return sum(one.reserved for one in uses), sum(one.used for one in uses), max(errors, default=0.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_100_at_once_never_reserve_more_than_the_limit(store_server: Server, stream: bool) -> None:
    """U4. Each asks for up to 200 tokens and gets them; the limit has room for a part of them."""
    async with (
        SimServer(faults={"token_s": 0.002}) as sim,
        gateway(provider("one", sim.url), limits=(tokens(5000),), **shared(store_server)) as here,
    ):
        answers = await at_once(here, 100, chat(max_tokens=200, stream=stream))
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 429}
        records = await here.settled(100)
        reserved, used, error = settled(records, "t")
        assert 5000 - 250 < reserved <= 5000
        assert used <= 5000 + max(0.0, error)
        assert used == sim.engine.generation_tokens_total + sim.engine.prompt_tokens_total
        assert sum(status == 200 for status in statuses) == len(sim.requests) - _probes(sim)


def _probes(sim: SimServer) -> int:
    return sum(one.method != "POST" for one in sim.requests)


@pytest.mark.parametrize("where", ["shared", "off"])
async def test_100_at_once_pass_a_budget_by_one_request_at_most(
    store_server: Server, where: str, tmp_path: Any
) -> None:
    """U8, with an answer whose length is bounded by the request."""
    settings = shared(store_server) if where == "shared" else {}
    async with (
        SimServer(faults={"token_s": 0.002}) as sim,
        gateway(provider("one", sim.url, models=[PRICED]), data_dir=tmp_path, **settings) as here,
    ):
        key, _ = await here.app.keys.create({"name": "poor", "budget": Budget(2.0, "currency", "day")})
        answers = await at_once(here, 100, chat(max_tokens=200), key)
        assert {answer.status for answer in answers} == {200, 402}
        records = await here.settled(100)
        costs = [record.cost for record in records if record.cost]
        assert 1.5 < sum(costs) <= 2.0 + max(costs)


async def test_what_was_seen_is_reserved_the_next_time(store_server: Server) -> None:
    """Requests that leave the length open: the second hundred is held to what the first ones used."""
    async with (
        SimServer(faults={"tokens": 3000}) as sim,
        gateway(provider("one", sim.url), limits=(tokens(40_000),), **shared(store_server)) as here,
    ):
        assert (await here.ask("POST", CHAT, chat())).status == 200
        answers = await at_once(here, 100, chat())
        assert {answer.status for answer in answers} == {200, 429}
        reserved, used, error = settled(await here.settled(101), "t")
        assert used <= 40_000 + 3000
        assert error <= 3000 - OUTPUT_TOKENS  # the first one's; the others were known
        assert reserved <= 40_000 + OUTPUT_TOKENS


async def test_an_answer_beyond_its_estimate_is_charged_while_it_comes(store_server: Server) -> None:
    """Nothing is admitted on what is gone, and in the end each token was charged once."""
    async with (
        SimServer(faults={"tokens": 2600, "token_s": 0.0002}) as sim,
        gateway(provider("one", sim.url), limits=(tokens(2500, 0.001),), **shared(store_server)) as here,
        here.connect() as client,
    ):
        client.send("POST", CHAT, chat(stream=True))
        await client.head()
        bucket = next(iter(here.app.limiter._buckets.values()))
        await until(
            lambda: bucket.level + bucket.loan - bucket.owed < 2500 * 1_000_000 - 1_300_000_000, 20.0, "charged"
        )
        assert here.records == [], "it runs"
        while await client.chunk():
            pass
        await here.settled(1)
        (limit,) = here.record.limits
        assert limit.used == (here.record.prompt_tokens or 0) + 2600
        await until(lambda: not bucket.owed and not bucket.sent, what="told")
        await until(lambda: abs(bucket.level + bucket.loan - (2500 - limit.used) * 1_000_000) < 1_000_000, what="once")
        assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 429
        assert not here.app.limiter._running


async def test_no_request_is_left_among_those_that_run(store_server: Server) -> None:
    limits = (tokens(1_000_000), Limit("few", "key", "requests", 100, 1.0))
    async with (
        SimServer(faults={"token_s": 0.01}) as sim,
        gateway(provider("one", sim.url), limits=limits, **shared(store_server)) as here,
    ):
        for number in range(20):
            async with here.connect() as client:
                client.send("POST", CHAT, chat(stream=True, max_tokens=50))
                if number % 2:
                    await client.head()
                client.abort()
        await here.settled(20)
        await until(lambda: not here.app.limiter._running, what="nothing runs")
