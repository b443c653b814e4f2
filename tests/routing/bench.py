"""What choosing costs a request: `python -m tests.routing.bench`, some ten seconds.

Microseconds from a parsed body to a lease: the prompt's bytes, their hashes, the choice, the index and the load. All
engines hold the beginning of the prompt, which makes it dearest to look up. Prints the median, and the 99th percentile
behind the stroke.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence

from gateway.catalog import Offer
from gateway.config import Model
from gateway.dispatch.asking import ask_for
from gateway.dispatch.plan import Plan
from gateway.routing.policies import DEFAULT, POLICIES
from gateway.routing.prefix import Bound, Index
from gateway.runtimes import RUNTIMES
from gateway.upstreams.upstream import Upstream
from gateway.wire.body import Body

SIZES = (1_000, 10_000, 100_000, 400_000, 4_000_000)
FLEETS = (8, 100, 1000)
ROUNDS = 200


def fleet(count: int) -> tuple[Offer, ...]:
    bound = Bound(256 * 1024 * 1024)
    model = Model("m", "M")
    return tuple(
        Offer(model, Upstream(f"u{n}", "p", RUNTIMES["vllm"], f"http://u{n}/v1", index=Index(bound)))
        for n in range(count)
    )


def body(size: int, turn: int) -> Body:
    words = random.Random(size).randbytes(size // 2).hex()
    messages = [{"role": "user", "content": words}, {"role": "user", "content": f"turn {turn}"}]
    return Body.parse(json.dumps({"model": "m", "messages": messages}).encode())


def measure(offers: Sequence[Offer], size: int, policy: str) -> tuple[float, float]:
    choose = POLICIES[policy]
    asked = [body(size, turn) for turn in range(20)]
    plans = [Plan(one, (tuple(offers),), "chat", "") for one in asked]
    for offer in offers:
        ask = ask_for(plans[0], offer, 0.0)
        offer.upstream.lease(1000, 0.0, "m", ask.prompt).began(0.1)
    spent = []
    for turn in range(ROUNDS):
        now = time.monotonic()
        began = time.perf_counter()
        ask = ask_for(plans[turn % len(plans)], offers[0], now)
        choice = choose(offers, ask)
        lease = choice.candidate.upstream.lease(choice.uncached, now, ask.model, ask.hashed)
        spent.append(time.perf_counter() - began)
        lease.began(now + 0.1)
        if turn % 3:
            lease.release()
    spent.sort()
    return statistics.median(spent) * 1e6, spent[int(0.99 * len(spent))] * 1e6


def main() -> None:
    policy = sys.argv[1] if len(sys.argv) > 1 else DEFAULT
    print(f"{policy}: microseconds, median / p99")
    print(f"{'prompt bytes':>14}" + "".join(f"{count:>18} upstreams" for count in FLEETS))
    fleets = [fleet(count) for count in FLEETS]
    for size in SIZES:
        cells = (measure(offers, size, policy) for offers in fleets)
        print(f"{size:>14}" + "".join(f"{median:>18.0f} / {most:<7.0f}" for median, most in cells), flush=True)


if __name__ == "__main__":
    main()
