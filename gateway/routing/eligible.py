"""Which offers of a pool may be asked now: not tried yet, not draining, not ejected, not asked to be left alone.

Never eject everyone: outcomes may have ejected an upstream that its probes find well, and where fewer than half of a
pool is left those count again; where nobody is left, everyone does, for an upstream thought dead may answer and an
empty pool cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from gateway.routing.breaker import Breaker

#: below this part of the pool, what only outcomes have ejected is asked again
PANIC_PART: Final = 0.5


class Place(Protocol):
    """What is known of an upstream."""

    @property
    def breaker(self) -> Breaker: ...

    @property
    def dialling(self) -> int: ...

    @property
    def draining(self) -> bool: ...

    def suspect(self, now: float) -> bool:
        """Whether it has been silent on a connection being opened for longer than a healthy one ever is."""


class Candidate(Protocol):
    @property
    def upstream(self) -> Place: ...

    #: asked by the upstream to be left alone until then
    quiet_until: float


T = TypeVar("T", bound=Candidate)


def eligible(tier: Sequence[T], tried: Sequence[object], now: float) -> Sequence[T]:
    """Those of `tier` to choose from; empty if there is none. `tried`: the upstreams that this request has been at."""
    if not tried:
        if len(tier) == 1:
            return tier if not tier[0].upstream.draining else ()
        for one in tier:  # nearly always all are well: nothing is made then
            upstream = one.upstream
            if not upstream.breaker.clear or upstream.dialling or upstream.draining or one.quiet_until > now:
                break
        else:
            return tier
    left = [one for one in tier if not one.upstream.draining and one.quiet_until <= now and one.upstream not in tried]
    awake = [one for one in left if not (one.upstream.dialling and one.upstream.suspect(now))]
    ready = [one for one in awake if one.upstream.breaker.allows(now)]
    if len(ready) < PANIC_PART * len(left):
        ready = [one for one in awake if one in ready or not one.upstream.breaker.gone]
    return ready or left


def well(ready: Sequence[Candidate], now: float) -> bool:
    """Whether one of those that may be asked is not ejected, or due for its trial."""
    return any(one.upstream.breaker.state != "open" or one.upstream.breaker.allows(now) for one in ready)


def quiet_for_s(tiers: Sequence[Sequence[Candidate]], now: float) -> float:
    """Seconds until the first of those that asked to be left alone may be asked again; 0.0 if none has."""
    waits = [one.quiet_until - now for tier in tiers for one in tier if one.quiet_until > now]
    return min(waits, default=0.0)
