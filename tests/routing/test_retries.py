"""What a failure means, and how often requests are sent again."""

from __future__ import annotations

import random
from email.utils import formatdate

import pytest

from gateway.routing.retries import QUIET_MAX_S, RULES, RetryBudget, backoff_s, retry_after_s


def test_what_is_not_the_upstreams_fault_ejects_nobody() -> None:
    assert {outcome for outcome, rule in RULES.items() if not rule.weight} == {
        "auth_failed", "busy", "client_gone", "given_up", "outrun", "total_timeout", "unfit",
    }  # fmt: skip


@pytest.mark.parametrize("traffic", [50, 1_000, 20_000])
def test_retries_are_a_tenth_of_the_traffic_and_the_reserve(traffic: int) -> None:
    """All fail, ten a second and each asked again as long as it may be."""
    budget = RetryBudget(0.1)
    retries = 0
    for number in range(traffic):
        budget.arrived()
        retries += sum(budget.take(number / 1000) for _ in range(2))
    assert retries == budget.spent
    assert retries <= 0.1 * traffic + RetryBudget.RESERVE + traffic / 1000
    assert retries >= 0.1 * traffic


def test_a_lone_users_failure_is_tried_again_each_time() -> None:
    budget = RetryBudget(0.1)
    for minute in range(100):
        budget.arrived()
        assert budget.take(60.0 * minute)
        assert budget.take(60.0 * minute)


def test_what_is_saved_up_is_bounded() -> None:
    budget = RetryBudget(1.0)
    for _ in range(100_000):
        budget.arrived()
    taken = 0
    while budget.take(1.0):
        taken += 1
    assert taken <= RetryBudget.SAVED_MAX + 1


def test_no_budget_is_no_retry() -> None:
    budget = RetryBudget(0.0)
    budget.arrived()
    assert not budget.take(1000.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"3", 3.0),
        (b" 0 ", 0.0),
        (b"86400", QUIET_MAX_S),
        (b"9" * 5000, QUIET_MAX_S),
        (b"", None),
        (b"-3", None),
        (b"soon", None),
        (b"\xff\xfe", None),
        (b"Wed, 99 Foo 2026 99:99:99 GMT", None),
        (formatdate(1_000_007.0, usegmt=True).encode(), 7.0),
        (formatdate(999_000.0, usegmt=True).encode(), 0.0),
    ],
)
def test_retry_after(text: bytes, seconds: float | None) -> None:
    assert retry_after_s(text, 1_000_000.0) == seconds


def test_backoff_grows_and_is_never_the_same() -> None:
    dice = random.Random(1)
    for attempts in range(1, 6):
        waits = {backoff_s(attempts, dice.random()) for _ in range(50)}
        assert len(waits) == 50
        assert 0.025 * 2 ** (attempts - 1) <= min(waits) <= max(waits) < 0.075 * 2 ** (attempts - 1)
    assert backoff_s(1000, 0.5) < 10
