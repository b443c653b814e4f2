"""Who may be asked: the well ones; and never nobody because everybody was ejected."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.routing.breaker import IN_A_ROW, Breaker
from gateway.routing.eligible import eligible, quiet_for_s


@dataclass(eq=False)
class Place:
    breaker: Breaker = field(default_factory=Breaker)
    draining: bool = False
    dialling: int = 0
    hangs: bool = False

    def suspect(self, now: float) -> bool:
        return self.hangs


@dataclass(eq=False)
class Offer:
    upstream: Place = field(default_factory=Place)
    quiet_until: float = 0.0


def pool(count: int) -> tuple[Offer, ...]:
    return tuple(Offer() for _ in range(count))


def eject(*offers: Offer, gone: bool = False) -> None:
    for offer in offers:
        offer.upstream.breaker.failed(0.0, IN_A_ROW, gone=gone)


def test_a_pool_that_is_well_is_given_as_it_is() -> None:
    tier = pool(3)
    assert eligible(tier, (), 1.0) is tier


def test_the_tried_the_draining_the_ejected_and_the_quiet_are_left_out() -> None:
    tier = pool(8)
    tier[0].upstream.draining = True
    eject(tier[1])
    tier[2].quiet_until = 2.0
    assert list(eligible(tier, (tier[3].upstream,), 0.5)) == list(tier[4:])


def test_a_connection_that_hangs_is_not_asked_more() -> None:
    tier = pool(3)
    tier[0].upstream.dialling, tier[0].upstream.hangs = 1, True
    tier[1].upstream.dialling = 1  # just being opened
    assert list(eligible(tier, (), 0.5)) == [tier[1], tier[2]]


def test_where_too_few_are_left_outcomes_are_not_believed_but_probes_are() -> None:
    tier = pool(8)
    eject(*tier[:3])
    eject(*tier[3:5], gone=True)
    assert list(eligible(tier, (), 0.5)) == [*tier[:3], *tier[5:]]


def test_half_of_a_pool_is_enough() -> None:
    tier = pool(8)
    eject(*tier[:4])
    assert list(eligible(tier, (), 0.5)) == list(tier[4:])


def test_where_all_are_gone_all_are_asked() -> None:
    tier = pool(3)
    eject(*tier, gone=True)
    assert list(eligible(tier, (), 0.5)) == list(tier)
    assert list(eligible(tier, (tier[0].upstream,), 0.5)) == list(tier[1:])
    assert list(eligible(tier, tuple(one.upstream for one in tier), 0.5)) == []


def test_the_only_one_is_asked_whatever_is_thought_of_it() -> None:
    (only,) = tier = pool(1)
    eject(only, gone=True)
    only.quiet_until = 9.0
    assert eligible(tier, (), 0.5) == tier
    only.upstream.draining = True
    assert not eligible(tier, (), 0.5), "but where an operator has said so"


def test_when_all_want_to_be_left_alone() -> None:
    tier = pool(2)
    tier[0].quiet_until, tier[1].quiet_until = 3.0, 2.0
    assert not eligible(tier, (), 0.5)
    assert quiet_for_s([tier], 0.5) == 1.5
    assert quiet_for_s([tier], 3.5) == 0.0
