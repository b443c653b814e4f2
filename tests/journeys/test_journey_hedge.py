"""A second attempt beside one that says nothing: the first to begin answers, the other leaves no trace."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest

from gateway.config import Model
from gateway.sim import SimServer
from tests.fleet.rig import engines, kinds, pool, together, unique, upstream_of
from tests.journeys.stage import CHAT, Client, Gateway, chat, gateway, provider, until

AFTER_S = 0.15


def posts(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


async def ask(here: Gateway, **more: Any) -> Any:
    return await here.ask("POST", CHAT, chat(max_tokens=3, **more))


@pytest.mark.parametrize("stream", [False, True])
async def test_who_begins_first_answers(stream: bool) -> None:
    async with (
        engines(2) as (slow, quick),
        gateway(pool([slow, quick]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        slow.faults = {"first_token_s": 20.0}
        answer = await ask(here, stream=stream)
        assert answer.status == 200
        assert answer.header("x-gateway-upstream") == upstream_of(here, quick).name
        assert answer.header("x-gateway-route-reason") == "hedge"
        (record,) = await here.settled(1)
        assert [made.outcome for made in record.attempts_made] == ["outrun", "ok"]
        assert (record.attempts, record.completion_tokens, record.estimated) == (2, 3, False)
        assert record.upstream == upstream_of(here, quick).name
        await until(lambda: posts(slow)[-1].closed_at is not None, within_s=1.0, what="the loser's connection closed")
        await until(lambda: slow.engine.running == 0, within_s=1.0, what="nothing computed for nobody")
        assert upstream_of(here, slow).breaker.state == "closed"
        here.assert_idle()


async def test_the_first_may_still_win() -> None:
    async with (
        engines(2) as (first, second),
        gateway(pool([first, second]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        first.faults = {"first_token_s": 1.0}
        second.faults = {"first_token_s": 20.0}
        answer = await ask(here, stream=True)
        assert answer.header("x-gateway-upstream") == upstream_of(here, first).name
        (record,) = await here.settled(1)
        assert [(made.upstream, made.outcome) for made in record.attempts_made] == [
            (upstream_of(here, second).name, "outrun"),
            (upstream_of(here, first).name, "ok"),
        ]
        await until(lambda: second.engine.running == 0, within_s=1.0, what="the loser stopped")
        here.assert_idle()


@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, {"status": 503, "retry_after": 5}])
async def test_a_second_that_fails_is_no_answer(fault: dict[str, Any]) -> None:
    async with (
        engines(2) as (first, second),
        gateway(pool([first, second]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        first.faults = {"first_token_s": 0.6}
        second.faults = fault
        answer = await ask(here, stream=True)
        assert answer.header("x-gateway-upstream") == upstream_of(here, first).name
        assert here.record.attempts == 2
        here.assert_idle()


async def test_a_second_that_failed_holds_no_place_while_the_first_goes_on() -> None:
    async with (
        engines(2) as (first, second),
        gateway(pool([first, second]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        first.faults = {"first_token_s": 3.0}
        second.faults = {"status": 500}
        asked = asyncio.create_task(ask(here, stream=True))
        failed = upstream_of(here, second)
        await until(lambda: failed.failed == 1, what="the second's answer")
        await until(lambda: failed.in_flight == 0, within_s=1.0, what="its place given back")
        assert upstream_of(here, first).in_flight == 1
        assert (await asked).status == 200
        here.assert_idle()


async def test_a_second_that_has_no_such_route_leaves_the_first_alone() -> None:
    async with (
        engines(2) as (first, second),
        gateway(pool([first, second]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        first.faults = {"first_token_s": 0.6}
        bare = upstream_of(here, second)
        bare.runtime = replace(bare.runtime, paths={})
        answer = await ask(here, stream=True)
        assert (answer.status, answer.header("x-gateway-upstream")) == (200, upstream_of(here, first).name)
        here.assert_idle()


async def test_a_first_that_fails_leaves_it_to_the_second() -> None:
    async with (
        engines(2) as (first, second),
        gateway(pool([first, second]), hedge_after_s=AFTER_S, policy="round_robin") as here,
    ):
        first.faults = {"slow_headers_s": 0.5, "status": 500}
        second.faults = {"first_token_s": 1.0}
        answer = await ask(here, stream=True)
        assert answer.status == 200
        (record,) = await here.settled(1)
        assert [made.outcome for made in record.attempts_made] == ["failed", "ok"]
        here.assert_idle()


async def test_none_without_need_budget_or_another() -> None:
    async with engines(2) as sims:
        async with gateway(pool(sims), hedge_after_s=5.0) as here:
            assert (await ask(here)).status == 200
            assert here.record.attempts == 1
        for sim in sims:
            sim.faults = {"first_token_s": 0.5}
        async with gateway(pool(sims), hedge_after_s=AFTER_S, retry_budget=0.0) as here:
            assert (await ask(here)).status == 200
            assert here.record.attempts == 1
        async with gateway(pool(sims[:1]), hedge_after_s=AFTER_S) as here:
            assert (await ask(here)).status == 200
            assert here.record.attempts == 1
        async with gateway(pool(sims)) as here:
            assert (await ask(here)).status == 200
            assert here.record.attempts == 1, "off unless asked for"


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_nothing_is_left_of_races_that_clients_leave() -> None:
    dice = random.Random(11)
    async with engines(3) as sims, gateway(pool(sims), hedge_after_s=0.01, retry_budget=1.0, attempts=3) as here:
        seats = asyncio.Semaphore(20)

        async def one() -> None:
            async with seats:
                for sim in sims:
                    sim.faults = dice.choice(
                        [{}, {"first_token_s": 0.03}, {"slow_headers_s": 0.02}, {"status": 500}, {"reset": True}]
                    )
                client = await Client.open(here.port, here.key)
                client.send("POST", CHAT, chat(stream=dice.random() < 0.6, max_tokens=4))
                await asyncio.sleep(dice.random() ** 2 * 0.08)
                (client.reset if dice.random() < 0.5 else client.leave)()

        await asyncio.gather(*(one() for _ in range(600)))
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        await until(lambda: not any(sim.engine.running for sim in sims), what="nothing running")
        here.assert_idle()
        raced = [record for record in here.records if any(made.outcome == "outrun" for made in record.attempts_made)]
        assert raced
        for sim in sims:
            sim.faults = {}
        assert kinds(await together(here, [unique(dice, stream=True, max_tokens=3)] * 10)) == {"done": 10}
        assert not [task for task in asyncio.all_tasks() if "attempt" in task.get_name()]
        here.assert_idle()


async def test_a_rival_of_another_model_does_not_make_its_pool_the_answers() -> None:
    """The first is ejected while it is waited for, so a fallback is asked beside it; the first answers, and dies."""
    async with (
        SimServer(models=("big",)) as first,
        SimServer(models=("small",)) as b,
        SimServer(models=("small",)) as c,
    ):
        one = provider("one", first.url, models=[Model("big", "big", fallbacks=("small",))])
        async with gateway(one, provider("two", b.url, c.url, models=["small"]), hedge_after_s=AFTER_S) as here:
            first.faults = {"first_token_s": 1.0, "cut_at_token": 2}
            b.faults = c.faults = {"first_token_s": 1.5}
            asked = asyncio.create_task(here.ask("POST", CHAT, chat("big", stream=True, max_tokens=5)))
            await asyncio.sleep(AFTER_S / 3)
            upstream_of(here, first).breaker.failed(monotonic(), 5)
            await asked
            (record,) = await here.settled(1)
            assert [made.outcome for made in record.attempts_made][:1] == ["outrun"], "a fallback was asked"
            assert (record.model, record.continued, record.outcome) == ("big", 0, "partial"), "one model, one voice"
