"""A process's side of a bucket: what it holds on loan from the store, what it owes it, and its share when on its own.

Decides without awaiting. Most requests are decided here, from the loan; a process without a store, or one whose store
is away, decides from its share of the bucket by the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from gateway.limits import bucket as arithmetic
from gateway.limits.bucket import MICRO, Rules, State
from gateway.limits.spec import Budget, Limit

TOKENS: Final = 0
SLOTS: Final = 1
BUDGET: Final = 2

#: units of a budget are counted in parts of this size: whole tokens, or a hundred-millionth of the currency's unit
BUDGET_UNIT: Final = {"tokens": 1, "currency": 100_000_000}
#: of a bucket, one process borrows at most this part; one too small to lend a few requests' worth lends nothing
_LOAN_PART: Final = 16
#: nothing refills a budget, so what a process that dies had on loan is lost to its key
_BUDGET_LOAN_PART: Final = 128
_LEND_FROM_REQUESTS: Final = 64
#: a loan aims at the needs of so many requests, at least
_LOAN_REQUESTS: Final = 32
#: and at lasting about so long: one half of it is used before more is asked for
_LOAN_S: Final = 0.5


class Bucket:
    """One bucket: of a limit and whom it is for (`key` in the store), or of a budget in one of its periods."""

    __slots__ = (
        "asked_at",
        "base",
        "budget",
        "ceiling",
        "counts",
        "empty_amount",
        "empty_until",
        "heard",
        "held_until",
        "in_use",
        "key",
        "kind",
        "lent",
        "level",
        "level_at",
        "life_ms",
        "limit",
        "loan",
        "loan_max",
        "low",
        "need",
        "owed",
        "rules",
        "sent",
        "seq",
        "share",
        "size",
        "told",
        "unit",
        "used_at",
    )

    def __init__(self, key: str, limit: Limit | None, budget: Budget | None, life_ms: int) -> None:
        self.key = key
        self.limit = limit
        self.budget = budget
        self.life_ms = life_ms
        if budget is not None:
            self.kind = BUDGET
            self.unit = BUDGET_UNIT[budget.unit]
            self.rules = Rules(round(budget.amount * self.unit), 0, arithmetic.DEBT_MAX)
            self.loan_max = self.rules.burst // _BUDGET_LOAN_PART
        else:
            assert limit is not None
            self.kind = SLOTS if limit.resource == "concurrent" else TOKENS
            self.unit = 1 if self.kind == SLOTS else MICRO
            burst = limit.burst * self.unit
            rate = round(limit.per_s * MICRO) if self.kind == TOKENS else 0
            self.rules = Rules(burst, rate, burst)
            small = limit.resource in ("requests", "concurrent") and limit.burst < _LEND_FROM_REQUESTS
            self.loan_max = 0 if small else burst // _LOAN_PART
        self.counts = _counts(limit, budget)  # what of a request's usage, "" if it is the same for each
        self.loan = 0  # on loan and unused; of slots: held and free
        #: on loan by the store's last word; what is given back may go to the loan up to that, and is charged to nobody
        self.lent = 0
        self.low = 0  # a loan that falls below it is topped up
        self.size = 0  # what loans aim at
        self.in_use = 0  # slots
        self.held_until = 0.0
        self.asked_at = 0.0  # when the store was last told what is held
        self.used_at = 0.0
        self.need = 0  # of the last request that asked the store
        self.owed = 0  # charges the store has not been told of
        self.sent = 0  # charges it may not have heard: told again under the same number
        self.seq = 0
        self.heard = -1  # number of the last call about it that was answered
        self.told = 0  # returned with the call that is under way
        self.ceiling = -1
        self.level = self.rules.burst  # the store's, as last heard
        self.level_at = 0.0
        #: refused here without asking: for this amount and more the bucket is empty until then
        self.empty_until = 0.0
        self.empty_amount = 0
        self.share: State | None = None  # this process's own bucket while there is no store
        self.base: State | None = None  # the same as if nothing had been granted from it

    def __repr__(self) -> str:
        return f"<Bucket {self.key} level {self.level} loan {self.loan} in use {self.in_use} owed {self.owed}>"

    def revise(self, new: Bucket) -> None:
        """Take over the constants of `new`: the limit was changed. A budget that grew leaves that much more."""
        for state in (self.share, self.base):
            if state is not None:
                state.level += new.rules.burst - self.rules.burst if self.kind == BUDGET else 0
                state.level = min(state.level, new.rules.burst)
        for field in ("budget", "counts", "life_ms", "limit", "loan_max", "rules"):
            setattr(self, field, getattr(new, field))

    @property
    def name(self) -> str:
        return self.limit.name if self.limit is not None else "budget"

    @property
    def observe(self) -> bool:
        return self.limit is not None and self.limit.observe

    def aim(self, need: int, now: float) -> int:
        """How much to have on loan for requests of this size; 0 if the bucket is too small to be divided. Learned: a
        loan that was used up soon is doubled, one that lasted long is halved.
        """
        if self.loan_max < need:
            return 0
        since_s = now - self.asked_at
        if since_s < _LOAN_S:
            if self.loan * 2 < self.lent:
                self.size *= 2
        elif since_s > 4 * _LOAN_S:
            self.size //= 2
        self.size = min(self.loan_max, max(self.size, need * _LOAN_REQUESTS))
        return self.size

    def idle(self) -> bool:
        """Nothing is held, owed or in use: forgetting the bucket loses nothing the store does not know."""
        return not (self.loan or self.in_use or self.owed or self.sent or self.share is not None)

    def known(self, now: float) -> int:
        """The level, as far as this process knows, in the bucket's parts; negative in debt."""
        if self.share is not None:
            return self.share.level
        if self.kind == SLOTS:
            return self.level + self.loan
        # To tell people and to begin with, not to decide: once for each request, so without the exact arithmetic.
        level = self.level + self.loan + int((now - self.level_at) * self.rules.rate)
        return min(level, self.rules.burst)


def _counts(limit: Limit | None, budget: Budget | None) -> str:
    if budget is not None:
        return budget.unit
    return limit.resource if limit is not None and limit.resource.endswith("tokens") else ""


Needs = Sequence[tuple[Bucket, int]]


def need_of(bucket: Bucket, prompt: int, completion: int, cost: float | None) -> int:
    """What a request must find. More than the whole bucket passes when it is full, and is charged afterwards: a level
    is never taken so far down that a charge's bound (`debt`) would lift it.
    """
    amount = used_of(bucket, prompt, completion, cost)
    if bucket.kind == BUDGET:
        return max(1, min(amount or 0, bucket.rules.burst))
    return bucket.unit if amount is None else min(amount, bucket.rules.burst)


def used_of(bucket: Bucket, prompt: int, completion: int, cost: float | None) -> int | None:
    """In the bucket's parts; None where it does not depend on tokens, or nobody knows the price."""
    what = bucket.counts
    if not what:
        return None
    if what == "total_tokens":
        return (prompt + completion) * MICRO
    if what == "input_tokens":
        return prompt * MICRO
    if what == "output_tokens":
        return completion * MICRO
    if what == "tokens":
        return prompt + completion
    return None if cost is None else math.ceil(cost * bucket.unit)


def take_loaned(needs: Needs, now: float, low: Callable[[Bucket], None]) -> bool:
    """Take all needs from what is on loan, or nothing at all. `low` is told of loans that want to be topped up."""
    for bucket, amount in needs:
        if bucket.loan < amount or now >= bucket.held_until:
            return False
    for bucket, amount in needs:
        left = bucket.loan = bucket.loan - amount
        bucket.used_at = now
        if bucket.kind == SLOTS:
            bucket.in_use += amount
        if left < bucket.low:
            bucket.low = 0  # said once
            low(bucket)
    return True


def take_share(needs: Needs, now: float, part: float) -> tuple[Bucket | None, list[Bucket]]:
    """Take all needs from this process's own buckets, each `part` of the whole one: the decision without a store.

    Gives the bucket that refuses, then nothing was taken, and the observed buckets that would have.
    """
    now_us = int(now * MICRO)
    short: list[Bucket] = []
    for bucket, amount in needs:
        state = bucket.share
        rules = shared_out(bucket, part)
        if state is None:
            # From what was last heard of the store, what is still on loan, and what it may not know: an outage is no
            # new burst.
            level = bucket.known(now) - bucket.owed - bucket.sent
            state = bucket.share = State(min(rules.burst, int(level * part)), 0, now_us)
            bucket.base = State(state.level, 0, now_us)
            if bucket.kind == BUDGET:  # nothing refills what the store still counts as lent
                bucket.owed -= bucket.loan
            if bucket.kind != SLOTS:
                bucket.loan = bucket.lent = bucket.low = 0
        if bucket.kind == SLOTS:
            state.level = rules.burst - bucket.in_use
        else:
            arithmetic.refill(state, rules, now_us)
        enough = state.level > 0 if bucket.kind == BUDGET else state.level >= min(amount, rules.burst)
        if not enough:
            if not bucket.observe:
                return bucket, short
            short.append(bucket)
    for bucket, amount in needs:
        if bucket in short:
            continue
        assert bucket.share is not None
        bucket.used_at = now
        bucket.share.level -= amount
        if bucket.kind == SLOTS:
            bucket.in_use += amount
    return None, short


def together_again(bucket: Bucket, now: float, part: float) -> None:
    """End a bucket's time alone.

    What was granted in it, and not refilled since, is owed to the store, so that the shares of all processes add up
    there. And the level is to be no higher than this share alone allows: the store may have forgotten what was before.
    """
    share, base = bucket.share, bucket.base
    bucket.share = bucket.base = None
    if share is None or base is None or bucket.kind == SLOTS:
        return
    rules = shared_out(bucket, part)
    now_us = int(now * MICRO)
    arithmetic.refill(share, rules, now_us)
    arithmetic.refill(base, rules, now_us)
    bucket.owed += base.level - share.level
    bucket.ceiling = max(0, bucket.rules.burst - (rules.burst - share.level))


def shared_out(bucket: Bucket, part: float) -> Rules:
    """The rules of this process's own bucket; never less than one unit."""
    rules = bucket.rules
    if part >= 1.0:
        return rules
    burst = max(int(rules.burst * part), min(bucket.unit, rules.burst))
    return Rules(burst, max(1, int(rules.rate * part)) if rules.rate else 0, rules.debt)
