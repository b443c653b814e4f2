"""What a store that goes away costs (U7): `python -m tests.limits.outage [--dead SECONDS] [--rate PER_S]`.

A whole gateway with limits and the ledger, a simulated engine and a Valkey, all on this machine, under a steady load
of small requests. The store is paused (SIGSTOP) and goes on; then it is killed for `--dead` seconds (600 by default, in
real time) and started again. Printed: the time to answer in each phase, requests that failed, how long the gateway took
to use the store again, and whether the ledger has each request once in the end. Exit code 1 if one failed or was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import uvloop

from gateway.config import Secret
from gateway.ledger.report import Window, usage
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, Gateway, chat, gateway, provider
from tests.limits.requests import requests, slots, tokens
from tests.store_fixtures import Server, program

LIMITS = (requests(10**6, 10**5), tokens(10**8, 10**6), slots(50))  # the slots are asked of the store each time
CLIENTS = 8


class Load:
    """Requests at a steady rate from `CLIENTS` connections; `took` by the phase in which each began."""

    def __init__(self, gate: Gateway, rate: float) -> None:
        self.phase = "before"
        self.took: dict[str, list[float]] = {}
        self.failed: list[str] = []
        self.sent = 0
        self._tasks = [asyncio.create_task(self._client(gate, CLIENTS / rate, n)) for n in range(CLIENTS)]
        self._over = False

    async def _client(self, gate: Gateway, every_s: float, number: int) -> None:
        client = await Client.open(gate.port, gate.key)
        due_at = time.monotonic() + every_s * number / CLIENTS
        while not self._over:
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            due_at += every_s
            phase, began_at = self.phase, time.monotonic()
            self.sent += 1
            answer = await client.ask("POST", CHAT, chat(max_tokens=2))
            self.took.setdefault(phase, []).append(time.monotonic() - began_at)
            if answer.status != 200:
                self.failed.append(f"{phase}: {answer.status} {answer.body[:200]!r}")
        client.abort()

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def back(gate: Gateway) -> float:
    """Seconds until the gateway uses the store again."""
    began_at = time.monotonic()
    while gate.app.store is None or not gate.app.store.up:
        await asyncio.sleep(0.01)
    return time.monotonic() - began_at


async def away(gate: Gateway, load: Load, name: str) -> float:
    """Seconds until the breaker opened; the load's phase is then `name`."""
    began_at = time.monotonic()
    while gate.app.store is not None and gate.app.store.up:
        await asyncio.sleep(0.001)
    load.phase = name
    return time.monotonic() - began_at


async def main(dead_s: float, rate: float) -> int:
    with tempfile.TemporaryDirectory(prefix="store-") as folder, tempfile.TemporaryDirectory() as data:
        server = Server(program("valkey"), Path(folder))
        settings = {"store": "auto", "redis_url": Secret(server.url), "data_dir": Path(data), "access_log": False}
        async with SimServer() as sim, gateway(provider("one", sim.url), limits=LIMITS, **settings) as gate:
            load = Load(gate, rate)
            await asyncio.sleep(5.0)
            load.phase = "paused, breaker closed"
            server.pause()
            opened_s = await away(gate, load, "paused, breaker open")
            await asyncio.sleep(5.0)
            server.resume()
            print(
                f"paused: the breaker opened after {opened_s * 1000:.0f} ms; "
                f"back {await back(gate):.2f} s after SIGCONT"
            )
            load.phase = "between"
            await asyncio.sleep(3.0)
            load.phase = "dead, breaker closed"
            server.kill()
            await away(gate, load, "dead, breaker open")
            await asyncio.sleep(dead_s)
            waiting = sum(path.stat().st_size for path in Path(data).glob("journal/*/*.seg"))
            server.start()
            back_s = await back(gate)
            print(f"dead for {dead_s:g} s: {waiting / 1e6:.1f} MB waited in the journal; back after {back_s:.2f} s")
            load.phase = "after"
            await asyncio.sleep(5.0)
            await load.end()
            assert gate.app.journal is not None
            root = gate.app.journal.root
            now = int(time.time())
            (row,) = await usage(root, gate.app.store, Window((), (now - 7200) // 3600 * 3600, now + 60))
            await asyncio.sleep(2.0)
            assert gate.app.shipper is not None
            print(f"\n{'':26} {'requests':>9} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
            for phase, took in load.took.items():
                took.sort()
                p50, p99 = took[len(took) // 2] * 1000, took[min(len(took) - 1, len(took) * 99 // 100)] * 1000
                print(f"{phase:26} {len(took):9} {p50:8.2f} {p99:8.2f} {took[-1] * 1000:8.2f}")
            lost = load.sent - row["requests"]
            made = sim.engine.generation_tokens_total
            print(f"\n{load.sent} requests: {len(load.failed)} failed, {lost} not in the ledger")
            shipped = gate.app.shipper.shipped
            print(f"output tokens: the ledger {row['output_tokens']}, the engine {made}; {shipped} records shipped")
            print("\n".join(load.failed[:10]))
        server.kill()
        return 1 if load.failed or lost or made != row["output_tokens"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dead", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=50.0, metavar="PER_S")
    given = parser.parse_args()
    raise SystemExit(uvloop.run(main(given.dead, given.rate)))
