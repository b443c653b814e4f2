"""One process of the history test: asks as fast as its delays allow, and writes down what was admitted.

    python -m tests.limits.worker URL SEED PART SECONDS JUMP

Each line of its output: before, after (monotonic microseconds, one clock for all processes of the machine), amount,
and 1 if the process decided alone. With JUMP its wall clock leaps by hours, which nothing may notice.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import uvloop

from gateway.limits.limiter import Limiter
from gateway.store.address import parse
from gateway.store.client import Store
from gateway.wire.usage import Usage
from tests.limits.requests import begin, end, tokens

BURST = 400
PER_S = 200.0
#: on a busy machine eight processes and a store wait for each other: that is no store that is away
PATIENCE_S = 5.0


class Patient(Store):
    """A store whose calls are waited for. One that is dead says so at once, by its connections."""

    async def _send(self, call: Any, timeout_s: float) -> Any:
        return await super()._send(call, max(timeout_s, PATIENCE_S))


async def main(url: str, seed: int, part: float, seconds: float, jump: bool) -> None:
    chance = random.Random(seed)
    if jump:
        true_time = time.time
        time.time = lambda: true_time() + chance.uniform(-1e6, 1e6)
    store = Patient(parse(url))
    await store.start()
    limiter = Limiter((tokens(BURST, PER_S, scope="global"),), store, part=part)
    admitted: list[tuple[int, int, int, int]] = []

    async def ask() -> None:
        while time.monotonic() < until:
            amount = chance.randint(1, 6)
            before = time.monotonic_ns() // 1000
            try:
                one = await begin(limiter, prompt=amount, began_unix_s=time.time())
            except Exception as error:
                if type(error).__name__ != "RateLimited":
                    raise
            else:
                after = time.monotonic_ns() // 1000
                assert one.taken is not None
                admitted.append((before, after, amount, int(one.taken.alone)))
                end(limiter, one, Usage(amount, 0))
            await asyncio.sleep(chance.choice((0.0, 0.001, 0.005, 0.02)))

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    until = time.monotonic() + seconds
    await asyncio.gather(*(ask() for _ in range(3)))
    await limiter.stop()
    await store.close()
    print("\n".join(" ".join(map(str, one)) for one in admitted))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "1"))
