"""Nothing is decided by what engines say of themselves on `/metrics`, which is seconds old: R3."""

from __future__ import annotations

import random

from tests.fleet.rig import engines, kinds, load, pool, unique
from tests.journeys.stage import gateway


async def test_nothing_hangs_on_the_engines_metrics() -> None:
    dice = random.Random(3)
    async with engines(4) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.faults = {"silent": True, "paths": ["/metrics"]}
        async with load(here, 16, lambda number: unique(dice, max_tokens=1)) as running:
            await running.count(400)
        for upstream in here.app.catalog.upstreams:
            await here.app.control.probe(upstream)
        assert kinds(running.outcomes) == {"done": len(running.outcomes)}
        assert {upstream.health.status for upstream in here.app.catalog.upstreams} == {"ok"}
        served = [upstream.served for upstream in here.app.catalog.upstreams]
        assert max(served) <= 1.25 * sum(served) / len(served), served
