"""What must not grow, leak, cost or disturb, however long it goes on: R7, R8, S1, S4."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from tests.fleet.rig import engines, load, pool, unique
from tests.journeys.stage import CHAT, Client, chat, gateway, until


async def test_probes_cost_no_tokens() -> None:
    """R8."""
    async with engines(3) as sims, gateway(pool(sims)) as here:
        for _ in range(3):
            for upstream in here.app.catalog.upstreams:
                await here.app.control.probe(upstream)
        assert all(sim.requests_total >= 3 for sim in sims)
        assert {request.method for sim in sims for request in sim.requests} == {"GET"}
        assert [sim.tokens_ever for sim in sims] == [(0, 0)] * 3


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_ten_thousand_posts_while_engines_close_idle_connections_at_random() -> None:
    """R7."""
    async with engines(4) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.faults = {"close_idle_random_s": 0.01}
        async with load(here, 32, lambda number: chat(max_tokens=1, user=str(number)), pause_s=0.004) as running:
            await running.count(10_000, within_s=150)
        assert Counter(outcome.kind for outcome in running.outcomes) == {"done": len(running.outcomes)}
        assert sum(sim.connections_total for sim in sims) > 200, "connections were closed in between"
        assert here.app.dispatcher.retries == 0, "a stale connection is no attempt"
        # the engine has seen each once: the resend is for what nobody had taken
        assert sum(sim.finished["length"] for sim in sims) == len(running.outcomes)
        here.assert_idle()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nothing_leaks_in_ten_thousand_cancels_and_timeouts() -> None:
    """S1, with four engines that are slow, break and recover meanwhile."""
    dice = random.Random(11)
    count = 10_000
    faults: list[dict[str, Any]] = [
        {}, {"token_s": 0.002}, {"slow_headers_s": 0.02}, {"silent": True}, {"status": 503}, {"cut_at_token": 2},
        {"reset": True}, {"stall_at_token": 1}, {"first_token_s": 0.02},
    ]  # fmt: skip
    async with engines(4) as sims, gateway(pool(sims)) as here:
        seats = asyncio.Semaphore(40)

        async def one() -> None:
            async with seats:
                dice.choice(sims).faults = dice.choice(faults)
                client = await Client.open(here.port, here.key)
                stream = dice.random() < 0.7
                client.send("POST", CHAT, unique(dice, 5, stream=stream, max_tokens=dice.choice([1, 8, 200])))
                await asyncio.sleep(dice.random() ** 2 * 0.03)
                (client.reset if dice.random() < 0.5 else client.leave)()

        await asyncio.gather(*(one() for _ in range(count)))
        for sim in sims:
            sim.faults = {}
        await until(lambda: here.app.in_flight() == 0, within_s=10, what="nothing in flight")
        await until(lambda: all(sim.engine.running == 0 for sim in sims), what="nothing running")
        here.assert_idle()
        assert not any("upstream" in task.get_name() for task in asyncio.all_tasks())
        async with load(here, 4, lambda number: chat(max_tokens=2)) as running:
            await running.count(50)
        assert Counter(outcome.kind for outcome in running.outcomes[-40:]) == {"done": 40}
