"""One tenant asks for ten times its share; what another, which keeps to its own, feels of it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tests.fleet.rig import Outcome, unique

from .stand import KEY, Clients, Stand, milliseconds, stand

#: two engines with eight places each; a request holds one for 0.2 s and as long again for its 1 to 31 tokens: 40
#: requests a second in all. Of one length they would end in step, and all who wait would wait for the next step.
_SLOTS = 8
_CAPACITY = 40.0
_SHARE = _CAPACITY / 2


async def fairness(seconds: float = 20.0, seed: int = 1) -> dict[str, Any]:
    """TTFT of a tenant at 0.8 of its half, alone and beside one that offers ten times its own half."""
    found: dict[str, Any] = {}
    for name, greed in (("alone", 0.0), ("beside a greedy one", 10.0)):
        async with stand(
            2, "--speed", "0", "--fault", "first_token_s=0.2", "--fault", "token_s=0.0125",
            provider={"maxInFlight": _SLOTS}, keys=("modest", "greedy"), GATEWAY_QUEUE_S="5",
        ) as here:  # fmt: skip
            modest, greedy = await asyncio.gather(
                _offer(here, "modest", 0.8 * _SHARE, seconds, seed),
                _offer(here, "greedy", greed * _SHARE, seconds, seed + 1),
            )
        found[name] = {
            **milliseconds([one.head_s for one in modest if one.kind == "done"]),
            "refused": sum(one.kind != "done" for one in modest),
            "greedy_served": sum(one.kind == "done" for one in greedy),
            "greedy_refused": sum(one.kind != "done" for one in greedy),
        }
    found["p90_ratio"] = round(found["beside a greedy one"]["p90_ms"] / found["alone"]["p90_ms"], 3)
    return found


async def _offer(here: Stand, key: str, rate: float, seconds: float, seed: int) -> list[Outcome]:
    if not rate:
        return []
    dice = random.Random(seed)
    arrivals, at = [], 0.0
    while at < seconds:
        at += dice.expovariate(rate)
        arrivals.append((at, unique(dice, 10, stream=True, max_tokens=dice.randint(1, 31))))
    clients = Clients(here, KEY + key)
    outcomes = await clients.at(arrivals)
    clients.close()
    return outcomes
