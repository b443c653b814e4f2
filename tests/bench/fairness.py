"""What a tenant notices of another that sends ten times its share: the fair queue before simulated engines.

    python -m tests.bench.fairness                 # --engines 8 --room 16 --seeds 3 --load 0.9 --reserve 4
    python -m tests.bench.fairness --sockets       # the gateway itself, over sockets and in real time

A fleet of engines (`gateway.sim.engine`) takes `room` requests at once each. Its capacity is what it answers a second
while everybody wants more than that; a tenant's share is half of it. `light` sends `load` times its share, alone and
then beside `flood`, which sends ten times its own. Told are light's times to first token: with the fleet to itself,
with half a fleet to itself, beside flood through the fair queue, and beside flood in the order of arrival. All but
`--sockets` is in virtual time, by the product's own queue, so the machine does not matter.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field

from gateway.handlers.gate import CREDIT_S, RESERVE_PART, TICK_S
from gateway.routing.fair import FairQueue, Turn
from gateway.sim.engine import Engine, Request

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


def arrivals(tenant: str, rate: float, until_s: float, dice: random.Random, number: Iterator[int]) -> Iterator[Asked]:
    """Poisson, with prompts of 200 to 2,000 tokens and answers of 20 to 400."""
    at = dice.expovariate(rate)
    while at < until_s:
        yield Asked(tenant, at, dice.randrange(200, 2000), dice.randrange(20, 400), next(number))
        at += dice.expovariate(rate)


def run(
    engines: int, room: int, rates: dict[str, float], seconds: float, seed: int, *, fair: bool = True, reserve: int = 0
) -> list[Asked]:
    """All that was answered within `seconds` of virtual time."""
    fleet = Fleet([Engine(speed=1.0) for _ in range(engines)], room, fair, reserve)
    number = iter(range(10**9))
    coming = heapq.merge(
        *(arrivals(name, rate, seconds, random.Random(f"{seed}{name}"), number) for name, rate in rates.items()),
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
    engines, room, seconds = args.engines, args.room, args.seconds
    after_s = seconds / 6
    capacity = len(run(engines, room, {"flood": 1000.0}, seconds / 2, 0)) / (seconds / 2)
    share = capacity / 2
    rate = args.load * share
    both = {"light": rate, "flood": FLOOD_SHARES * share}
    print(f"{engines} engines of {room}: {capacity:.1f} requests/s at most; light sends {rate:.1f}/s")
    print("light's time to first token, p90 (p50), in seconds, and all requests served a second")
    print(f"{'seed':>4}  {'alone':<15}{'half the fleet':<16}{'beside flood':<15}{'ratio':<7}{'FIFO':<18}served/s")
    ratios = []
    for seed in range(args.seeds):
        alone = waits(run(engines, room, {"light": rate}, seconds, seed), "light", after_s)
        half = waits(run(engines // 2, room, {"light": rate}, seconds, seed), "light", after_s)
        found = run(engines, room, both, seconds, seed, reserve=args.reserve)
        fair = waits(found, "light", after_s)
        fifo = waits(run(engines, room, both, seconds, seed, fair=False), "light", after_s)
        ratios.append(p(90, fair) / p(90, alone))
        print(
            f"{seed:>4}  {told(alone):<15}{told(half):<16}{told(fair):<15}{ratios[-1]:<7.2f}{told(fifo):<18}"
            f"{len(found) / seconds:.1f}"
        )
    print(f"p90 beside flood / p90 alone: {statistics.mean(ratios):.2f} (mean of {args.seeds} seeds)")


def told(found: list[float]) -> str:
    return f"{p(90, found):.3f} ({p(50, found):.3f})" if len(found) > 1 else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--room", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--reserve", type=int, default=4)
    args = parser.parse_args()
    virtual(args)


if __name__ == "__main__":
    main()
