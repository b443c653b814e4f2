"""Which upstream takes the next request. Each policy is a pure function of the candidates' counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from gateway.upstreams.upstream import Upstream


class Candidate(Protocol):
    @property
    def upstream(self) -> Upstream: ...


T = TypeVar("T", bound=Candidate)
Policy = Callable[[Sequence[T]], T]


def least_in_flight(candidates: Sequence[T]) -> T:
    """The candidate with the fewest requests in flight for its weight; ties go to the one served least often.

    The tie-break matters: a burst that finds everyone idle must spread, not gather on the first of the list. An
    upstream whose last probe failed is chosen only if all have: a probe can be wrong, an empty answer always is.
    """
    return min(candidates, key=_load)


def _load(candidate: Candidate) -> tuple[bool, float, float]:
    upstream = candidate.upstream
    weight = upstream.weight
    return (
        upstream.health.status == "unreachable",
        upstream.in_flight / weight,
        upstream.served / weight,
    )


POLICIES: Final[dict[str, Policy]] = {"least_in_flight": least_in_flight}  # type: ignore[type-arg]
