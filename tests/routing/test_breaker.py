"""The circuit breaker, told the time: when it opens, whom it lets through, how it comes back."""

from __future__ import annotations

import random

import pytest

from gateway.routing.breaker import (
    CALM_S,
    FOUND_S,
    IN_A_ROW,
    OPEN_MAX_S,
    OPEN_S,
    SLOW_START_S,
    TRIAL_S,
    WINDOW_S,
    Breaker,
)


def opened(now: float = 0.0, *, gone: bool = False) -> Breaker:
    breaker = Breaker()
    assert breaker.failed(now, IN_A_ROW, gone=gone)
    assert breaker.state == "open"
    return breaker


def on_trial(now: float = 0.0) -> Breaker:
    breaker = opened(now)
    assert breaker.allows(now + OPEN_S)
    assert breaker.state == "half_open"
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker()
    for number in range(IN_A_ROW - 1):
        assert not breaker.failed(float(number))
        assert breaker.allows(float(number))
    assert breaker.failed(9.0)
    assert not breaker.allows(9.0)


def test_an_answer_between_them_starts_the_count_again() -> None:
    breaker = Breaker()
    for number in range(10 * IN_A_ROW):
        breaker.failed(float(number)) if number % 3 else breaker.succeeded(float(number))
    assert breaker.state == "closed"


def test_it_opens_when_too_large_a_part_fails() -> None:
    breaker = Breaker()
    for number in range(19):
        assert not (breaker.failed(1.0) if number % 2 else breaker.succeeded(1.0))
    assert breaker.failed(1.0)


def test_a_part_that_failed_long_ago_does_not_count() -> None:
    breaker = Breaker()
    for number in range(18):
        breaker.failed(1.0) if number % 2 else breaker.succeeded(1.0)
    assert not breaker.failed(1.5 + WINDOW_S)
    breaker.succeeded(1.5 + WINDOW_S)
    assert not breaker.failed(1.5 + WINDOW_S)


def test_one_trial_at_a_time() -> None:
    breaker = opened(10.0)
    assert not breaker.allows(10.0 + OPEN_S - 0.01)
    assert breaker.allows(10.0 + OPEN_S)
    breaker.chosen(10.0 + OPEN_S)
    assert not breaker.allows(10.0 + OPEN_S + 0.01)
    assert breaker.allows(10.0 + OPEN_S + TRIAL_S), "a trial that says nothing does not keep the door shut"


def test_a_trial_whose_client_left_is_no_word() -> None:
    breaker = on_trial()
    breaker.chosen(OPEN_S)
    breaker.neutral()
    assert breaker.state == "half_open"
    assert breaker.allows(OPEN_S)


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = on_trial()
    breaker.chosen(1.0)
    assert breaker.succeeded(1.1)
    assert breaker.state == "closed"


def test_each_time_it_stays_open_longer_up_to_a_limit_until_it_was_calm() -> None:
    breaker, now, waits = opened(), 0.0, []
    for _ in range(8):
        began = now
        while not breaker.allows(now):
            now += 0.25
        waits.append(now - began)
        breaker.chosen(now)
        assert breaker.failed(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, OPEN_MAX_S, OPEN_MAX_S, OPEN_MAX_S]
    now += OPEN_MAX_S
    assert breaker.allows(now)
    assert breaker.succeeded(now)
    now += CALM_S
    assert breaker.failed(now, IN_A_ROW)
    assert not breaker.allows(now + OPEN_S - 0.01)
    assert breaker.allows(now + OPEN_S)


def test_a_probe_brings_back_what_was_gone_and_not_what_answered_badly() -> None:
    gone, bad = opened(gone=True), opened()
    assert gone.found_well(0.1)
    assert gone.state == "closed"
    assert not bad.found_well(0.1), "engines say they are well while every answer fails"
    assert bad.state == "open"


def test_what_a_probe_finds_gone_is_not_tried_by_requests_while_it_is_fresh() -> None:
    breaker = Breaker()
    assert breaker.found_gone(0.0)
    assert not breaker.found_gone(1.0)
    assert not breaker.allows(0.9 + FOUND_S), "each trial would be a request that waits"
    assert breaker.allows(1.1 + FOUND_S), "nobody looks after it: a request has to"


def test_what_was_lost_with_it() -> None:
    breaker = Breaker()
    breaker.failed(5.0, IN_A_ROW, gone=True)
    assert breaker.took(4.9)
    assert not breaker.took(5.1)
    assert not opened(5.0).took(4.9), "it answers badly: work sent again is work for the fleet"


def test_slow_start_gives_a_growing_part_of_the_turns() -> None:
    breaker = opened(gone=True)
    breaker.found_well(0.0)
    shares = []
    for second in range(int(SLOW_START_S) + 1):
        turns = sum(breaker.allows(second + number / 1000) for number in range(1000))
        shares.append(turns / 1000)
    assert 0.1 <= shares[0] <= 0.2
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert breaker.clear


def test_the_first_turn_after_its_return_comes_at_once() -> None:
    breaker = opened(gone=True)
    breaker.found_well(3.0)
    assert breaker.allows(3.0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_it_can_be_asked_again(seed: int) -> None:
    """No order of events locks it for good, and `clear` never contradicts the state."""
    dice = random.Random(seed)
    breaker, now = Breaker(), 0.0
    for _ in range(400):
        now += dice.random() * 3
        match dice.randrange(6):
            case 0:
                breaker.failed(now, dice.choice([1, 2, 5]), gone=dice.random() < 0.5)
            case 1:
                breaker.succeeded(now)
            case 2:
                breaker.neutral()
            case 3:
                breaker.found_well(now)
            case 4:
                breaker.found_gone(now)
            case 5:
                if breaker.allows(now):
                    breaker.chosen(now)
        assert not breaker.clear or breaker.state == "closed"
        assert 0.0 <= breaker.share(now) <= 1.0
    deadline = now + OPEN_MAX_S + FOUND_S + TRIAL_S + SLOW_START_S
    while not breaker.allows(now):
        now += 0.5
        assert now < deadline, breaker
