"""Where requests go in a fleet that is well: R1, R2, and that no decision hangs on what engines say of themselves."""

from __future__ import annotations

import random

from gateway.sim import SimServer
from tests.fleet.rig import engines, kinds, pool, together, unique
from tests.journeys.stage import gateway


def posts(sim: SimServer) -> int:
    return sum(1 for request in sim.requests if request.method == "POST")


async def test_simultaneous_arrivals_are_shared_out_evenly() -> None:
    """R1: each choice sees the load that the ones before it have put on, though nothing has been answered yet."""
    dice = random.Random(1)
    async with engines(8) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.faults = {"first_token_s": 0.5}
        outcomes = await together(here, [unique(dice, max_tokens=2) for _ in range(64)])
        assert kinds(outcomes) == {"done": 64}
        assert all(7 <= posts(sim) <= 9 for sim in sims), [posts(sim) for sim in sims]
        here.assert_idle()
