"""The arithmetic alone: against fractions, which lose nothing, and its promise about windows."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import bucket
from gateway.limits.bucket import MICRO, Rules, State

bursts = st.integers(1, 10**9).map(lambda units: units * MICRO)
rates = st.one_of(st.integers(1, 10**15), st.sampled_from([1, 277, 999_999, MICRO, MICRO + 1, 333_333_333]))
steps = st.lists(st.integers(0, 10**7), min_size=1, max_size=30)


@given(bursts, rates, steps)
def test_many_small_refills_are_one_large_refill(burst: int, rate: int, waits: list[int]) -> None:
    rules = Rules(burst, rate)
    small, large = State(0, 0, 1), State(0, 0, 1)
    now = 1
    for wait in waits:
        now += wait
        bucket.refill(small, rules, now)
    bucket.refill(large, rules, now)
    assert (small.level, small.at_us) == (large.level, large.at_us)
    exact = Fraction(rate, MICRO) * (now - 1)
    assert large.level == min(burst, exact.__floor__())


@given(bursts, rates, st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**10)), max_size=40))
def test_no_window_admits_more_than_burst_and_rate(burst: int, rate: int, asked: list[tuple[int, int]]) -> None:
    rules = Rules(burst, rate)
    state = bucket.full(rules, 0)
    now = 0
    granted: list[tuple[int, int]] = []
    for wait, amount in asked:
        now += wait
        bucket.refill(state, rules, now)
        if bucket.take(state, amount):
            granted.append((now, amount))
    for first in range(len(granted)):
        total = 0
        for at, amount in granted[first:]:
            total += amount
            assert total <= burst + Fraction(rate, MICRO) * (at - granted[first][0])


@given(bursts, rates, st.integers(-(10**9), 10**9))
def test_after_the_wait_it_passes_and_not_before(burst: int, rate: int, level: int) -> None:
    rules = Rules(burst, rate, burst)
    amount = burst // 2 + 1
    wait = bucket.wait_us(level, rules, amount)
    assert wait is not None
    state = State(level, 0, 0)
    bucket.refill(state, rules, wait)
    assert wait > bucket.ELAPSED_MAX_US or state.level >= amount
    if wait:
        state = State(level, 0, 0)
        bucket.refill(state, rules, wait - 1)
        assert state.level < amount


@settings(max_examples=50)
@given(bursts, rates, st.integers(0, 10**15), st.integers(0, 10**9))
def test_loans_leave_less_room(burst: int, rate: int, elapsed: int, out: int) -> None:
    state = State(0, 0, 0)
    bucket.refill(state, Rules(burst, rate), elapsed, min(out, burst))
    assert 0 <= state.level <= burst - min(out, burst)


def test_a_clock_that_goes_back_refills_nothing() -> None:
    state = State(5, 0, 1000)
    bucket.refill(state, Rules(100 * MICRO, MICRO), 10)
    assert (state.level, state.at_us) == (5, 1000)


def test_charges_go_into_debt_as_deep_as_allowed() -> None:
    rules = Rules(10, 0, 10)
    state = State(3, 0, 0)
    bucket.charge(state, rules, 100)
    assert state.level == -10
    bucket.charge(state, rules, -100)
    assert state.level == 10
