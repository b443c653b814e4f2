"""What is said of a limit or a budget that refuses: words for people, numbers for programs."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from gateway.errors import GatewayError, QuotaExceeded, RateLimited
from gateway.exchange import LimitUse
from gateway.limits import bucket as arithmetic
from gateway.limits.bucket import MICRO
from gateway.limits.local import SLOTS, Bucket
from gateway.limits.spec import FOR_EVER, period_of

#: what is said of the time when a slot will be free, which nobody knows
_SLOT_WAIT_S: Final = 1.0


def refusal(bucket: Bucket, amount: int, level: int, unix_s: float) -> GatewayError:
    """The error for a request that needs `amount` of a bucket with `level` left (in its parts) at the time `unix_s`."""
    left = max(0, level)
    if bucket.budget is not None:
        return _exceeded(bucket, level, unix_s)
    assert bucket.limit is not None
    limit = bucket.limit
    what = limit.resource.replace("_", " ")
    used = f"{limit.burst - left // bucket.unit}/{limit.burst}"
    where = f"limit {limit.name!r} (scope {limit.scope})"
    if bucket.kind == SLOTS:
        return _limited(
            f"{where} reached: {used} concurrent requests run; try again when one of them has ended",
            "requests", _SLOT_WAIT_S,
        )  # fmt: skip
    wait_s = (arithmetic.wait_us(min(level, amount - 1), bucket.rules, amount) or 1) / MICRO
    needs = "" if limit.resource == "requests" else f", this request may need {-(-amount // MICRO)}"
    return _limited(
        f"{where} reached: {used} {what} used{needs}; it will pass in {wait_s:.3g} s",
        "requests" if limit.resource == "requests" else "tokens", wait_s,
    )  # fmt: skip


def use(bucket: Bucket, reserved: int, used: int, source: str) -> LimitUse:
    """What the record says of a limit; the amounts are in the bucket's parts."""
    unit = bucket.unit
    if bucket.budget is not None:
        return LimitUse(bucket.name, "key", bucket.budget.unit, reserved / unit, used / unit, source)
    assert bucket.limit is not None
    limit = bucket.limit
    return LimitUse(limit.name, limit.scope, limit.resource, reserved // unit, used // unit, source)


def _limited(message: str, kind: str, wait_s: float) -> RateLimited:
    error = RateLimited(
        message, retry_after_s=math.ceil(wait_s), headers=(("retry-after-ms", str(math.ceil(wait_s * 1000))),)
    )
    error.type = kind
    return error


def _exceeded(bucket: Bucket, level: int, unix_s: float) -> QuotaExceeded:
    budget = bucket.budget
    assert budget is not None
    _, until_unix_s = period_of(budget.period, unix_s)
    unit = "tokens" if budget.unit == "tokens" else "currency units"
    again = "it does not renew itself"
    if until_unix_s < FOR_EVER:
        again = f"it renews at {datetime.fromtimestamp(until_unix_s, UTC):%Y-%m-%dT%H:%MZ}"
    used = budget.amount - level / bucket.unit
    return QuotaExceeded(
        f"the budget of this key is spent or reserved (scope key): {used:.10g}/{budget.amount:.10g} {unit} for "
        f"{'the ' + budget.period if budget.period != 'total' else 'all time'}; {again}",
        headers=(("x-should-retry", "false"),),
    )


@lru_cache(maxsize=1024)
def reset_text(seconds: int) -> str:
    """ "0s", "12s", "6m0s", "1h0m0s": as OpenAI's headers say it."""
    if seconds < 60:
        return f"{seconds}s"
    minutes, s = divmod(seconds, 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m}m{s}s" if h else f"{m}m{s}s"
