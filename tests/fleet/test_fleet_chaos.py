"""Everything at once: engines of two runtimes die, hang, refuse, stall and come back while clients ask, wait and leave.

Two engines are never touched, so hardly any request has a reason to fail. What is asserted is what must hold whatever
happens: no wrong word, no answer that looks whole and is not, one record for each request, one bill, nothing left over.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gateway.sim import SimServer
from gateway.sim.dialect import parse_call
from gateway.sim.faults import NONE
from tests.fleet.rig import Outcome, engines, load, pool, unique
from tests.journeys.stage import CHAT, SIM_MODEL, Client, Gateway, gateway, provider, timeouts, until

DISASTERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "busy": lambda dice: {"status": 429, "retry_after": 1},
    "broken": lambda dice: {"status": 500},
    "unavailable": lambda dice: {"status": 503},
    "silent": lambda dice: {"silent": True},
    "black hole": lambda dice: {"black_hole": True},
    "stalls": lambda dice: {"stall_at_token": dice.randint(0, 10)},
    "cuts": lambda dice: {"cut_at_token": dice.randint(0, 10), "cut_with": dice.choice(["fin", "rst"])},
    "ends early": lambda dice: {"clean_cut_at_token": dice.randint(0, 10)},
    "says an error": lambda dice: {"error_event_at_token": dice.randint(0, 10)},
    "resets": lambda dice: {"reset": True},
    "slow": lambda dice: {"first_token_s": 0.3, "token_s": 0.02},
    "closes": lambda dice: {"close_idle_random_s": 0.02},
    "dies": lambda dice: {"kill_at_token": dice.randint(0, 10), "down_s": dice.uniform(0.1, 0.5)},
}


async def disasters(sims: list[SimServer], dice: random.Random, seconds: float, seen: Counter[str]) -> None:
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + seconds
    while loop.time() < ends_at:
        await asyncio.sleep(dice.uniform(0.02, 0.12))
        sim = dice.choice(sims)
        name = dice.choice([*DISASTERS, "killed", "well", "well"])
        seen[name] += 1
        if name == "killed":
            sim.kill(down_s=dice.uniform(0.1, 0.5))
        else:
            sim.faults = DISASTERS[name](dice) if name in DISASTERS else {}
    for sim in sims:
        sim.faults = {}
        await sim.revive()


async def leavers(here: Gateway, dice: random.Random, running: Callable[[], bool]) -> int:
    """Clients that ask and go away at any moment."""
    count = 0
    while running():
        client = await Client.open(here.port, here.key)
        client.send("POST", CHAT, unique(dice, 8, stream=dice.random() < 0.7, max_tokens=dice.choice([1, 20, 300])))
        await asyncio.sleep(dice.random() ** 2 * 0.1)
        (client.reset if dice.random() < 0.5 else client.leave)()
        count += 1
    return count


def expected(body: dict[str, Any]) -> str:
    return "".join(parse_call(body, True, (SIM_MODEL,), 1 << 20, NONE).choices[0].pieces)


def check(outcome: Outcome, body: dict[str, Any]) -> None:
    if outcome.kind == "done":
        assert outcome.text == expected(body), outcome
    elif outcome.kind == "broken":
        assert outcome.stream
        assert outcome.whole, "also a broken stream is framed to its end"
        last = outcome.events[-1]
        if "error" not in last:  # cut behind its finish: that is an end, too
            assert last["choices"][0]["finish_reason"], outcome
            assert outcome.text == expected(body), outcome
            return
        assert b"[DONE]" not in outcome.body
        assert expected(body).startswith(outcome.text), outcome
    else:
        assert outcome.kind in ("500", "502", "503", "504"), outcome


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    limits = timeouts(connect_s=1.0, first_byte_s=1.0, idle_s=1.0)
    bodies: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()

    def body(number: int) -> dict[str, Any]:
        made = unique(dice, 10, stream=number % 3 != 0, max_tokens=dice.randint(1, 25))
        bodies[made["messages"][0]["content"]] = made
        return made

    async with engines(4) as vllm, engines(2, runtime="llamacpp") as llama:
        providers = (
            pool(vllm, timeouts=limits, max_in_flight=8),
            provider("llama", *(sim.url for sim in llama), runtime="llamacpp", timeouts=limits, max_in_flight=8),
        )
        async with gateway(*providers, queue_s=5.0, retry_budget=1.0) as here:
            going = [True]
            async with load(here, 24, body) as running:
                left = [asyncio.ensure_future(leavers(here, dice, lambda: going[0])) for _ in range(6)]
                await disasters([*vllm[1:], llama[1]], dice, 12.0, seen)
                going[0] = False
                assert sum(await asyncio.gather(*left)) > 100
                await running.count(100)  # they are served as before
            for outcome in running.outcomes:
                check(outcome, bodies[outcome.prompt])
            found = Counter(outcome.kind for outcome in running.outcomes)
            asked = len(running.outcomes)
            assert set(seen) >= {*DISASTERS, "killed"}
            assert found["done"] > 0.97 * asked, found
            assert [outcome.kind for outcome in running.outcomes[-50:]] == ["done"] * 50

            await until(lambda: here.app.in_flight() == 0, within_s=10, what="nothing in flight")
            sims = [*vllm, *llama]
            await until(lambda: not any(sim.engine.running or sim.engine.waiting for sim in sims), what="idle engines")
            here.assert_idle()
            records = {record.request_id: record for record in here.records}
            assert len(records) == len(here.records), "one record for each request"
            for outcome in running.outcomes[-len(records) :]:
                record = records.get(outcome.request_id)
                if record is not None and outcome.kind == "done":
                    tokens = bodies[outcome.prompt]["max_tokens"]
                    assert (record.outcome, record.completion_tokens) == ("ok", tokens), record
