"""What a tenant notices of another that sends ten times its share: the fair queue before simulated engines.

    python -m tests.bench.fairness                 # --engines 8 --room 16 --seeds 3 --load 0.8 --reserve 4
    python -m tests.bench.fairness --sockets       # the gateway itself, over sockets and in real time

A fleet of engines (`gateway.sim.engine`) takes `room` requests at once each. Its capacity is what it answers a second
while everybody wants more than that; a tenant's share is half of it. `light` sends `load` times its share, alone and
then beside `flood`, which sends ten times its own. Told are light's times to first token: with the fleet to itself,
with half a fleet to itself, beside flood through the fair queue, and beside flood in the order of arrival. All but
`--sockets` is in virtual time, by the product's own queue, so the machine does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from time import monotonic

from gateway.dispatch.gate import CREDIT_S, RESERVE_PART, TICK_S
from gateway.queueing.fair import FairQueue, Turn
from gateway.sim import SimServer
from gateway.sim.engine import Engine, Request
from tests.journeys.stage import CHAT, Client, Gateway, gateway, provider

FLOOD_SHARES = 10.0


@dataclass(slots=True)
class Asked:
    """A request and what became of it."""

    tenant: str
    at: float
    prompt: int
    output: int
    number: int
    engine: int = -1
    made: int = 0
    charged: int = 0
    first_at: float = 0.0


@dataclass
class Fleet:
    """Engines with a limit, before them a queue: `fair` or else first come, first served."""

    engines: list[Engine]
    room: int
    fair: bool
    reserve: int
    queue: FairQueue = field(init=False)
    line: deque[Asked] = field(default_factory=deque)
    running: list[set[int]] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    finished: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running = [set() for _ in self.engines]
        self.queue = FairQueue(most=1_000_000, credit_s=CREDIT_S, spare=self._spare)

    def _spare(self, places: Collection[Hashable]) -> int:
        """As the gate does it."""
        total = self.room * len(self.engines)
        return total - sum(map(len, self.running)) - min(self.reserve, int(RESERVE_PART * total))

    def arrive(self, one: Asked, now: float) -> None:
        self.asked[one.number] = one
        free = self._freest()
        if free is not None and not len(self.queue) and not self.line:
            self._begin(one, free, now)
        elif self.fair:
            cost = self.queue.cost(one.prompt)
            self.queue.enter(Turn(one.tenant, range(len(self.engines)), now, cost=cost, of=one), now)
            for place in range(len(self.engines)):
                self._next(place, now)
        else:
            self.line.append(one)

    def _freest(self) -> int | None:
        place = min(range(len(self.engines)), key=lambda number: len(self.running[number]))
        return place if len(self.running[place]) < self.room else None

    def _begin(self, one: Asked, place: int, now: float) -> None:
        one.engine = place
        self.running[place].add(one.number)
        self.engines[place].submit(Request(one.number, one.prompt, one.output), now)

    def step(self, place: int, now: float) -> None:
        for event in self.engines[place].step(now):
            one = self.asked[event.id]  # type: ignore[index]  # the ids are ours
            one.made = event.generated
            if not one.first_at:
                one.first_at = now
            if event.finished:
                self.running[place].discard(one.number)
                self._charge(one)
                self.finished.append(one)
                del self.asked[one.number]
                self._next(place, now)

    def _next(self, place: int, now: float) -> None:
        while len(self.running[place]) < self.room:
            if self.fair:
                turn = self.queue.next(place, now)
                if turn is None:
                    return
                self._begin(turn.of, place, now)
            elif self.line:
                self._begin(self.line.popleft(), place, now)
            else:
                return

    def charge(self) -> None:
        for running in self.running:
            for number in running:
                self._charge(self.asked[number])

    def _charge(self, one: Asked) -> None:
        cost = self.queue.cost(0, one.made - one.charged)
        self.queue.charge(one.engine, 1, one.tenant, 1.0, cost)
        one.charged = one.made


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: prompts and answers of any length within these bounds, in tokens."""

    prompt: tuple[int, int] = (200, 2000)
    output: tuple[int, int] = (20, 400)


def arrivals(
    tenant: str, rate: float, until_s: float, dice: random.Random, number: Iterator[int], load: Load
) -> Iterator[Asked]:
    """A Poisson process."""
    at = dice.expovariate(rate)
    while at < until_s:
        yield Asked(tenant, at, dice.randrange(*load.prompt), dice.randrange(*load.output), next(number))
        at += dice.expovariate(rate)


def run(
    args: argparse.Namespace,
    engines: int,
    rates: dict[str, float],
    seed: int,
    *,
    fair: bool = True,
    reserve: int = 0,
) -> list[Asked]:
    """All that was answered within the time, which is virtual."""
    room, seconds = args.room, args.seconds
    load = Load(args.prompt, args.output)
    fleet = Fleet([Engine(speed=1.0) for _ in range(engines)], room, fair, reserve)
    number = iter(range(10**9))
    coming = heapq.merge(
        *(arrivals(name, rate, seconds, random.Random(f"{seed}{name}"), number, load) for name, rate in rates.items()),
        key=lambda one: one.at,
    )
    following = next(coming, None)
    charge_at = TICK_S
    while True:
        place = min(range(engines), key=lambda one: fleet.engines[one].next_at)
        now = min(fleet.engines[place].next_at, following.at if following else math.inf, charge_at)
        if now >= seconds:
            return fleet.finished
        if following is not None and now == following.at:
            fleet.arrive(following, now)
            following = next(coming, None)
        elif now == charge_at:
            fleet.charge()
            charge_at += TICK_S
        else:
            fleet.step(place, now)


def p(quantile: int, found: list[float]) -> float:
    return statistics.quantiles(found, n=100)[quantile - 1]


def waits(found: list[Asked], tenant: str, after_s: float) -> list[float]:
    return [one.first_at - one.at for one in found if one.tenant == tenant and one.at >= after_s]


def virtual(args: argparse.Namespace) -> None:
    after_s = args.seconds / 6
    capacity = len(run(args, args.engines, {"flood": 1000.0}, 0)) / args.seconds
    share = capacity / 2
    rate = args.load * share
    both = {"light": rate, "flood": FLOOD_SHARES * share}
    print(f"{args.engines} engines of {args.room}: {capacity:.1f} requests/s at most; light sends {rate:.1f}/s")
    print("light's time to first token, p90 (p50), in seconds, and all requests served a second")
    print(f"{'seed':>4}  {'alone':<15}{'half the fleet':<16}{'beside flood':<15}{'ratio':<7}{'FIFO':<18}served/s")
    ratios = []
    for seed in range(args.seeds):
        alone = waits(run(args, args.engines, {"light": rate}, seed), "light", after_s)
        half = waits(run(args, args.engines // 2, {"light": rate}, seed), "light", after_s)
        found = run(args, args.engines, both, seed, reserve=args.reserve)
        fair = waits(found, "light", after_s)
        fifo = waits(run(args, args.engines, both, seed, fair=False), "light", after_s)
        ratios.append(p(90, fair) / p(90, alone))
        print(
            f"{seed:>4}  {told(alone):<15}{told(half):<16}{told(fair):<15}{ratios[-1]:<7.2f}{told(fifo):<18}"
            f"{len(found) / args.seconds:.1f}"
        )
    print(f"p90 beside flood / p90 alone: {statistics.mean(ratios):.2f} (mean of {args.seeds} seeds)")


def told(found: list[float]) -> str:
    return f"{p(90, found):.3f} ({p(50, found):.3f})" if len(found) > 1 else "never"


async def over_sockets(args: argparse.Namespace) -> None:
    """The same with the gateway itself, in real time, everything in one process: `--speed` slows the engines down, lest
    the machine be the bottleneck.
    """
    load = Load(args.prompt, args.output)
    async with AsyncExitStack() as stack:
        sims = [
            await stack.enter_async_context(SimServer(engine=Engine(speed=args.speed))) for _ in range(args.engines)
        ]
        fleet = provider("fleet", *[sim.url for sim in sims], max_in_flight=args.room)
        keyed: dict[str, dict[str, object]] = {"light": {}, "flood": {}}
        here = await stack.enter_async_context(
            gateway(
                fleet, keyed=keyed, queue_reserve=args.reserve, queue_max=5000, queue_s=args.seconds, access_log=False
            )
        )
        full = await sent(here, {"flood": 100.0 * args.speed}, args.seconds, load, 0, most=args.room * args.engines * 2)
        capacity = len(full["flood"]) / (args.seconds / 2)
        share = capacity / 2
        print(f"{args.engines} engines of {args.room}: {capacity:.1f} requests/s at most")
        alone = (await sent(here, {"light": args.load * share}, args.seconds, load, 1))["light"]
        both = {"light": args.load * share, "flood": FLOOD_SHARES * share}
        fair = (await sent(here, both, args.seconds, load, 1, most=4000))["light"]
        print(f"light alone {told(alone)}, beside flood {told(fair)}: ratio {p(90, fair) / p(90, alone):.2f}")


async def sent(
    here: Gateway, rates: dict[str, float], seconds: float, load: Load, seed: int, most: int = 10_000
) -> dict[str, list[float]]:
    """Times to first token of what was answered in time, by tenant; what runs at the end is dropped."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    seats = {name: asyncio.Semaphore(most) for name in rates}
    number = iter(range(10**9))
    async with asyncio.TaskGroup() as tasks:
        running: list[asyncio.Task[None]] = []
        began_at = monotonic()

        async def one(asked: Asked) -> None:
            async with seats[asked.tenant]:
                at = began_at + asked.at if len(rates) > 1 or asked.tenant == "light" else monotonic()
                client = await Client.open(here.port, here.keys[asked.tenant])
                try:
                    words = f"{len(rates)} {seed} {asked.number} " + "word " * asked.prompt  # nobody's cache has it
                    body = {"model": "sim", "messages": [{"role": "user", "content": words}], "stream": True}
                    client.send("POST", CHAT, {**body, "max_tokens": asked.output})
                    async with asyncio.timeout(2 * seconds):
                        await client.reader.readuntil(b'"content":"')
                        first_at = monotonic()
                        await client.reader.readuntil(b"[DONE]")
                    if monotonic() > began_at + seconds / 2:  # the fleet is as full as it will be
                        found[asked.tenant].append(first_at - at)
                finally:
                    client.abort()

        dice = {name: random.Random(f"{seed}{name}") for name in rates}
        coming = heapq.merge(
            *(arrivals(name, rate, seconds, dice[name], number, load) for name, rate in rates.items()),
            key=lambda asked: asked.at,
        )
        for asked in coming:
            late_s = began_at + asked.at - monotonic()
            if late_s > 0:
                await asyncio.sleep(late_s)
            running.append(tasks.create_task(one(asked)))
        await asyncio.sleep(max(0.0, began_at + seconds - monotonic()))
        for task in running:
            task.cancel()
    return found


def bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--room", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--reserve", type=int, default=4)
    parser.add_argument("--prompt", type=bounds, default=(200, 2000), metavar="LOW-HIGH", help="tokens")
    parser.add_argument("--output", type=bounds, default=(20, 400), metavar="LOW-HIGH", help="tokens")
    parser.add_argument("--sockets", action="store_true")
    parser.add_argument("--speed", type=float, default=0.5, help="of the engines, with --sockets")
    args = parser.parse_args()
    if args.sockets:
        asyncio.run(over_sockets(args))
    else:
        virtual(args)


if __name__ == "__main__":
    main()
