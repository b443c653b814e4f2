"""The arithmetic of a token bucket, in integers: the one formula, which `take.lua` repeats and is tested against.

Levels are in microunits, times in microseconds, rates in microunits a second; no fraction is ever lost or rounded up,
so a bucket admits no more than its burst and rate allow however often it is asked. Every product stays below 2**53,
because Lua's numbers are doubles. Pure; the clock is passed in.

A bucket's tokens are in three places: in the store (`State.level`), on loan to processes that decide with them
on their own (`out`), or spent. Level and loans together never exceed the burst: that, and not the rate alone, is
what keeps every window of t seconds to burst + rate * t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MICRO: Final = 1_000_000
#: no bucket is asked about a longer time
ELAPSED_MAX_US: Final = 10**14
#: what a level may sink to: charges after the fact are remembered, not without end
DEBT_MAX: Final = 10**15


@dataclass(frozen=True, slots=True)
class Rules:
    """A bucket's constants, in microunits: `burst`, the refill of a second (`rate`), and how deep its `debt` may be."""

    burst: int
    rate: int
    debt: int = 0


@dataclass(slots=True)
class State:
    """`level` microunits at the time `at_us`, and what was refilled beyond a whole microunit, in millionths of it."""

    level: int
    frac: int
    at_us: int


def full(rules: Rules, now_us: int) -> State:
    return State(rules.burst, 0, now_us)


def refill(state: State, rules: Rules, now_us: int, out: int = 0) -> None:
    """Bring the state to `now_us`; `out` microunits are on loan. A clock that went back refills nothing."""
    room = rules.burst - out
    elapsed_us = min(max(0, now_us - state.at_us), ELAPSED_MAX_US)
    state.at_us = max(now_us, state.at_us)
    if state.level >= room:
        state.level = room
        state.frac = 0
        return
    # Whole units a second are whole microunits a microsecond; the rest is divided, second by second.
    units, rest = divmod(rules.rate, MICRO)
    seconds, below_us = divmod(elapsed_us, MICRO)
    part = below_us * rest + state.frac
    level = state.level + elapsed_us * units + seconds * rest + part // MICRO
    if level >= room:
        state.level = room
        state.frac = 0
    else:
        state.level = level
        state.frac = part % MICRO


def take(state: State, amount: int) -> bool:
    """Take `amount` if it is there. Call `refill` first."""
    if state.level < amount:
        return False
    state.level -= amount
    return True


def charge(state: State, rules: Rules, amount: int, out: int = 0) -> None:
    """Take `amount` after the fact, into debt if need be; a negative amount is given back."""
    state.level = min(max(state.level - amount, -rules.debt), rules.burst - out)


def wait_us(level: int, rules: Rules, amount: int) -> int | None:
    """Microseconds until `amount` will be there, rounded up; None if never."""
    missing = min(amount, rules.burst) - level
    if missing <= 0:
        return 0
    return -(-missing * MICRO // rules.rate) if rules.rate else None
