"""What limits cost a request: `python -m tests.limits.bench`, some five seconds, against a Valkey of its own.

Prints processor time and round trips to the store for each request; the first line is what the loop around it costs.
32 requests run at a time, each for one turn of the loop.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import uvloop

from gateway.limits.limiter import Limiter
from gateway.limits.spec import Limit
from gateway.store.address import parse
from gateway.store.client import Store
from gateway.wire.usage import Usage
from tests.limits.requests import exchange, requests, slots, tokens
from tests.store_fixtures import Server, program

REQUESTS = 20_000
AT_ONCE = 32
WIDE = (
    requests(10**6, 10**6, name="requests"),
    tokens(10**9, 10**8, name="tokens", scope="key_model"),
    slots(10_000, name="parallel"),
)
SMALL = (slots(50, name="few"),)


async def measure(limits: tuple[Limit, ...], store: Store | None) -> tuple[float, float]:
    """Microseconds of processor time, and round trips, for each request."""
    limiter = Limiter(limits, store)
    usage = Usage(900, 300)

    async def ask() -> None:
        for _ in range(REQUESTS // AT_ONCE):
            one = exchange()
            entry = limiter.entry(one, "m")
            waiting = None if entry is None else limiter.admit(one, entry, 900, 1024)
            if waiting is not None:
                await waiting
            await asyncio.sleep(0)
            one.usage = usage
            limiter.settle(one)

    began_s = time.process_time()
    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    all_us = (time.process_time() - began_s) * 1e6 / REQUESTS
    await limiter.stop()
    return all_us, limiter.calls / REQUESTS


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        server = Server(program("valkey"), Path(folder))
        store = Store(parse(server.url))
        await store.start()
        print(f"{'':28} {'us/request':>10} {'above none':>10} {'trips/request':>13}")
        none = 0.0
        for name, limits, where in (
            ("no limits", (), None),
            ("3 limits, no store", WIDE, None),
            ("3 limits, store", WIDE, store),
            ("50 slots, asked each time", SMALL, store),
        ):
            cost_us, trips = await measure(limits, where)
            none = none or cost_us
            print(f"{name:28} {cost_us:10.1f} {cost_us - none:10.1f} {trips:13.4f}")
        await store.close()
        server.kill()


if __name__ == "__main__":
    uvloop.run(main())
