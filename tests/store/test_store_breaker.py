"""The breaker as a table of what comes in and what it says."""

from __future__ import annotations

from gateway.store.breaker import FAILURES, Breaker


def test_it_opens_after_failures_in_a_row_and_once() -> None:
    breaker = Breaker(0.0, closed=True)
    assert [breaker.failed(1.0) for _ in range(FAILURES - 1)] == [False] * (FAILURES - 1)
    breaker.succeeded()
    assert [breaker.failed(2.0) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    assert not breaker.closed
    assert breaker.changed_at == 2.0
    assert not breaker.failed(3.0)
    assert breaker.changed_at == 2.0


def test_only_a_probe_closes_it() -> None:
    breaker = Breaker(0.0)
    assert repr(breaker) == "<Breaker open, 0 failures in a row>"
    breaker.succeeded()  # an answer from before it opened
    assert not breaker.closed
    assert breaker.probed(5.0)
    assert breaker.closed
    assert not breaker.probed(6.0)
    assert breaker.changed_at == 5.0
    assert breaker.failures == 0
