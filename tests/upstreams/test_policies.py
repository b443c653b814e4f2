"""least_in_flight: who takes the next request."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest

from gateway.runtimes import RUNTIMES
from gateway.upstreams.policies import POLICIES, least_in_flight
from gateway.upstreams.upstream import Health, Upstream


class Offer(NamedTuple):
    upstream: Upstream


def pool(count: int, weights: list[int] | None = None) -> list[Offer]:
    return [
        Offer(Upstream(f"u{at}", "p", RUNTIMES["vllm"], f"http://u{at}/v1", weight=weights[at] if weights else 1))
        for at in range(count)
    ]


def test_a_burst_on_idle_engines_spreads_evenly() -> None:
    """64 arrivals at once on 8 idle engines: load counts from the choice, so each next choice sees the last."""
    engines = pool(8)
    for _ in range(64):
        least_in_flight(engines).upstream.lease()
    assert [one.upstream.in_flight for one in engines] == [8] * 8


def test_short_requests_one_by_one_spread_too() -> None:
    """Everyone is idle at each arrival: the tie must not gather them on the first of the list."""
    engines = pool(4)
    for _ in range(40):
        with least_in_flight(engines).upstream.lease():
            pass
    assert [one.upstream.served for one in engines] == [10] * 4


def test_a_busy_engine_is_passed_over_until_it_is_free() -> None:
    engines = pool(3)
    leases = [engines[0].upstream.lease() for _ in range(2)]
    taken = [least_in_flight(engines) for _ in range(1)]
    assert taken[0] is not engines[0]
    for _ in range(4):
        least_in_flight(engines).upstream.lease()
    assert [one.upstream.in_flight for one in engines] == [2, 2, 2]
    for lease in leases:
        lease.release()
    assert least_in_flight(engines) is engines[0]


def test_weights_share_the_load() -> None:
    engines = pool(3, weights=[1, 2, 5])
    for _ in range(80):
        least_in_flight(engines).upstream.lease()
    assert [one.upstream.in_flight for one in engines] == [10, 20, 50]


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 3, 4]])
def test_under_random_service_times_the_share_follows_the_weight(weights: list[int]) -> None:
    dice = random.Random(20)
    engines = pool(3, weights)
    served = Counter[str]()
    running = []
    for _ in range(8000):
        one = least_in_flight(engines).upstream
        served[one.name] += 1
        running.append(one.lease())
        while len(running) > 24:
            running.pop(dice.randrange(len(running))).release()
    for engine, weight in zip(engines, weights, strict=True):
        assert served[engine.upstream.name] / 8000 == pytest.approx(weight / sum(weights), abs=0.03)


def test_an_unreachable_engine_is_the_last_choice_but_a_choice() -> None:
    engines = pool(3)
    engines[0].upstream.health = Health("unreachable", "connection refused")
    for _ in range(20):
        assert least_in_flight(engines) is not engines[0]
        least_in_flight(engines).upstream.lease()
    for one in engines:
        one.upstream.health = Health("unreachable", "connection refused")
    assert least_in_flight(engines) is engines[0]  # all have failed their probe: the probe may be wrong


@pytest.mark.parametrize("status", ["unknown", "ok", "degraded"])
def test_every_other_health_takes_its_share(status: str) -> None:
    engines = pool(2)
    engines[0].upstream.health = Health(status, "")  # type: ignore[arg-type]
    engines[1].upstream.health = Health("ok", "")
    for _ in range(10):
        least_in_flight(engines).upstream.lease()
    assert [one.upstream.in_flight for one in engines] == [5, 5]


def test_one_candidate_is_the_choice() -> None:
    (only,) = pool(1)
    only.upstream.health = Health("unreachable", "")
    for _ in range(5):
        only.upstream.lease()
    assert least_in_flight([only]) is only


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_only_looks(name: str) -> None:
    engines = pool(4)
    before = [(one.upstream.in_flight, one.upstream.served) for one in engines]
    assert POLICIES[name](engines) in engines
    assert [(one.upstream.in_flight, one.upstream.served) for one in engines] == before
