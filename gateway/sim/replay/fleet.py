"""One load through one policy on a fleet of engines, on a virtual clock.

What chooses is the product's own: its policies, its load and its index, told of what happens as the gateway tells them.
The engines are `sim.engine`, coarse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from gateway.routing.load import Lease, Load
from gateway.routing.policies import Ask, Policy
from gateway.routing.prefix import Index, Prompt
from gateway.sim.engine import Engine, Pace, Request
from gateway.sim.replay.loads import BLOCK_TOKENS, Arrival


@dataclass(frozen=True, slots=True)
class Hardware:
    """An engine of the fleet: as it stands, about a 32B model on one H100, its KV cache extended into main memory.

    `rate`: prompt tokens per second (64 GFLOP a token at 40 % of the card's). `decode_s`: the shortest step, which
    reads the weights once. `cache_tokens`: its KV memory. `step_tokens`, `sequences`: what a step takes at most.
    """

    rate: float = 6000.0
    cache_tokens: int = 1_000_000
    step_tokens: int = 8192
    sequences: int = 256
    decode_s: float = 0.02

    def engine(self, speed: float = 1.0) -> Engine:
        return Engine(
            speed=speed,
            pace=Pace(b=1 / self.rate, c=self.decode_s),
            blocks=self.cache_tokens // BLOCK_TOKENS,
            max_sequences=self.sequences,
            step_tokens=self.step_tokens,
            block_tokens=BLOCK_TOKENS,
            coarse=True,
        )


class SimUpstream:
    """An engine as the policies see an upstream, and a candidate of itself."""

    __slots__ = ("engine", "load", "name", "next_at", "unloaded", "weight")

    def __init__(self, name: str, engine: Engine, load: Load) -> None:
        self.name = name
        self.engine = engine
        self.load = load
        self.weight = 1
        self.unloaded = False

    @property
    def upstream(self) -> SimUpstream:
        return self


@dataclass(slots=True)
class Run:
    """What came of a load: times to the first token in the order of arrival, None for what did not fit."""

    ttft_s: list[float] = field(default_factory=list)
    predicted_s: list[float] = field(default_factory=list)  # for those policies that predict
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    believed_tokens: int = 0
    shares: list[int] = field(default_factory=list)  # requests by engine
    span_s: float = 0.0


def run(
    arrivals: Sequence[Arrival],
    policy: Policy[SimUpstream],
    engines: int,
    hardware: Hardware,
    *,
    speeds: Sequence[float] = (),
    index_tokens: int | None = None,
    feedback: bool = True,
) -> Run:
    """Play `arrivals` to their end. `speeds`: factors of the engines, in turn. `index_tokens`: what the gateway thinks
    an engine's cache holds. Without `feedback` engines do not report what they held.
    """
    fleet = [
        SimUpstream(
            f"engine{n}",
            hardware.engine(speeds[n % len(speeds)] if speeds else 1.0),
            Load(Index(capacity_tokens=index_tokens or hardware.cache_tokens)),
        )
        for n in range(engines)
    ]
    result = Run()
    under_way: dict[int, tuple[Lease, Arrival]] = {}
    ttft_s = [math.nan] * len(arrivals)
    clocks = [one.engine for one in fleet]

    def advance(until: float) -> None:
        while True:
            engine = min(clocks, key=_next_at)
            now = engine.next_at
            if now > until or now == math.inf:
                return
            for event in engine.step(now):
                lease, arrival = under_way[event.id]  # type: ignore[index]
                if not lease.began_at:
                    ttft_s[event.id] = now - arrival.at  # type: ignore[call-overload]
                    lease.began(now)
                if event.finished:
                    result.cached_tokens += event.cached_tokens
                    if feedback:
                        lease.cached(event.cached_tokens, arrival.prompt.tokens)
                    lease.release(now)
                    del under_way[event.id]  # type: ignore[arg-type]

    for number, arrival in enumerate(arrivals):
        now = arrival.at
        advance(now)
        prompt = arrival.prompt
        ask = Ask("sim", prompt.tokens, prompt.itself, partial(str, arrival.session), now)
        choice = policy(fleet, ask)
        chosen = choice.candidate
        request = Request(number, prompt.tokens, arrival.output_tokens, prompt.hashes)
        try:
            chosen.engine.submit(request, now)
        except ValueError:
            result.refused += 1
            continue
        if choice.ttft_s is not None:
            result.predicted_s.append(choice.ttft_s)
        result.prompt_tokens += prompt.tokens
        result.believed_tokens += choice.cached
        under_way[number] = (Lease(chosen.load, choice.uncached, now, "sim", ask.hashed), arrival)
    advance(math.inf)
    result.ttft_s = [one for one in ttft_s if one == one]
    result.shares = [one.load.served for one in fleet]
    result.span_s = arrivals[-1].at - arrivals[0].at
    return result


def _next_at(engine: Engine) -> float:
    return engine.next_at


__all__ = ["Hardware", "Prompt", "Run", "SimUpstream", "run"]
