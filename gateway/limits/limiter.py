"""The Limiter: what handlers and middlewares see. `admit` before a request runs, `settle` when it is over.

All limits of a request are taken in one step or not at all: from what is on loan here, without awaiting, or by one
call of the store's script; on this process's share while the store is away; always here where there is no store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import GatewayError
from gateway.limits import bucket as arithmetic
from gateway.limits import texts
from gateway.limits.bucket import MICRO
from gateway.limits.estimate import Estimates
from gateway.limits.local import BUDGET, SLOTS, Bucket, Needs, need_of, shared_out, take_loaned, take_share, used_of
from gateway.limits.redis import Shared
from gateway.limits.spec import FOR_EVER, Limit, period_of
from gateway.limits.texts import reset_text
from gateway.store.client import Store, StoreAway, StoreError

if TYPE_CHECKING:
    from gateway.exchange import Exchange, LimitUse
    from gateway.identity.principals import Principal
    from gateway.wire.usage import Usage

#: (usage, seconds of the upstream, price) -> currency units, None where the price is not known
Cost = Callable[["Usage", float, Any], float | None]

_log = logging.getLogger("gateway.limits")

_YEARS_MS: Final = 10 * 366 * 86400 * 1000
_SLOT_LIFE_MS: Final = 60_000
_KEPT_MS: Final = 600_000
_ENTRIES_MAX: Final = 20_000
#: how often answers that are still coming are compared with what was reserved for them
_LOOK_EVERY_S: Final = 0.25
_BYTES_PER_TOKEN: Final = 4
_REQUESTS: Final = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\n"
)
_TOKENS: Final = _REQUESTS.replace(b"-requests", b"-tokens")


def _no_cost(usage: Usage, upstream_s: float, price: Any) -> float | None:
    return None


class Taken:
    """What a request holds of its buckets. `alone`: taken from this process's share, not in the store.

    `entry` and `source` are for the record: which buckets, and who granted it; "" until the store has answered.
    """

    __slots__ = ("alone", "entry", "needs", "source")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.needs: Needs = ()
        self.alone = False
        self.source = "loan"


class Entry:
    """The buckets of one (key, route, model), found once. Good for this `principal` and until `until_unix_s`.

    `fixed`: needs that are the same for each request, and `uses`, what its record says of them by source; None if some
    depend on its tokens.
    """

    __slots__ = ("buckets", "fixed", "priced", "principal", "requests", "tokens", "until_unix_s", "uses")

    def __init__(self, principal: Principal, buckets: tuple[Bucket, ...], until_unix_s: float) -> None:
        self.principal = principal
        self.buckets = buckets
        self.until_unix_s = until_unix_s
        self.fixed: Needs | None = None
        if all(bucket.limit is not None and not bucket.limit.resource.endswith("tokens") for bucket in buckets):
            self.fixed = tuple((bucket, bucket.unit) for bucket in buckets)
        self.uses = {
            source: tuple(texts.use(bucket, amount, amount, source) for bucket, amount in self.fixed or ())
            for source in ("loan", "store", "share")
        }
        self.priced = any(bucket.counts == "currency" for bucket in buckets)  # their needs depend on the cost
        #: what the x-ratelimit headers tell of: limits that refuse, of requests and of tokens
        told = [bucket for bucket in buckets if bucket.limit is not None and not bucket.observe]
        self.requests = [bucket for bucket in told if bucket.limit and bucket.limit.resource == "requests"]
        self.tokens = [bucket for bucket in told if bucket.limit and bucket.limit.resource.endswith("tokens")]


class Limiter:
    """`limits` hold for all keys; a key's own come with its principal, and replace the general ones of their name.

    `part`: how much of each limit this process grants by itself while the store is away. `cost` prices what a running
    answer has used so far. `refused` counts by name and
    scope, `observed` by name.
    """

    def __init__(
        self, limits: Sequence[Limit], store: Store | None, *, part: float = 1.0, cost: Cost = _no_cost
    ) -> None:
        self._limits = tuple(limits)
        self._cost = cost
        self._store = store
        self._part = part if store is not None else 1.0
        self._shared = Shared(store, part, self._give_back) if store is not None else None
        self._running: dict[Exchange, Taken] = {}  # streams whose needs depend on their tokens
        self._timer: asyncio.TimerHandle | None = None
        self.estimates = Estimates()
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._buckets: dict[str, Bucket] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.observed: dict[str, int] = {}
        if store is not None:
            store.on_change.append(self._changed)

    def revise(self, limits: Sequence[Limit], part: float) -> None:
        """Let these limits hold from now on. What was used of a limit that stays is still used."""
        self._limits = tuple(limits)
        if self._shared is not None:
            self._part = self._shared.part = part
        self._entries.clear()

    @property
    def degraded(self) -> bool:
        """The store is away: each process keeps limits for itself."""
        return self._store is not None and not self._store.up and bool(self._buckets or self._limits)

    @property
    def calls(self) -> int:
        """Round trips to the store so far."""
        return self._shared.calls if self._shared is not None else 0

    async def stop(self) -> None:
        """Give back what is on loan and tell the store what is owed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._shared is not None and not await self._shared.flush():
            _log.warning("the store is away: what requests used since it went is not charged to their limits")

    # -- before -------------------------------------------------------------------------------------------------

    def entry(self, exchange: Exchange, model: str) -> Entry | None:
        """The buckets that a request for `model` takes from; None if nothing limits it. "" if it is for no model."""
        principal: Principal | None = exchange.principal
        if principal is None or not (self._limits or principal.limits or principal.budget):
            return None
        found = self._entries.get((principal.key_id, exchange.route, model))
        if found is None or found.principal is not principal or exchange.began_unix_s >= found.until_unix_s:
            found = self._entry(principal, exchange.route, model, exchange.began_unix_s)
        return found if found.buckets else None

    def admit(
        self, exchange: Exchange, entry: Entry, prompt: int = 0, completion: int = 0, cost: float | None = None
    ) -> Awaitable[None] | None:
        """Take what the request needs: `prompt` and `completion` tokens and `cost` are estimates, settled later.

        None if it was taken at once, else an awaitable. Raises RateLimited or QuotaExceeded; then nothing was taken.
        """
        needs = entry.fixed
        if needs is None:
            needs = [(bucket, need_of(bucket, prompt, completion, cost)) for bucket in entry.buckets]
        now = monotonic()
        taken = Taken(entry)
        shared = self._shared
        if shared is None or not shared.up:
            self._alone(exchange, entry, needs, taken, now)
            return None
        if take_loaned(needs, now, shared.owe):
            taken.needs = needs
            exchange.taken = taken
            if exchange.stream and entry.fixed is None:
                self._run(exchange, taken)
            self._tell(exchange, entry, now)
            return None
        for bucket, amount in needs:
            if now < bucket.empty_until and amount >= bucket.empty_amount and not bucket.owed and not bucket.observe:
                raise self._refusal(exchange, entry, bucket, amount, now)
        return self._ask(shared, exchange, entry, needs, taken)

    async def _ask(self, shared: Shared, exchange: Exchange, entry: Entry, needs: Needs, taken: Taken) -> None:
        taken.source = ""
        waiting = shared.ask(needs, taken)
        exchange.taken = taken  # from now on: the store may grant it after the client has left
        try:
            refusing = await waiting
        except (StoreAway, StoreError) as error:
            if isinstance(error, StoreError):
                _log.error("the limits' script failed: %s", error)
            self._alone(exchange, entry, needs, taken, monotonic())
            return
        taken.source = "store"
        now = monotonic()
        if refusing is not None:
            exchange.taken = None
            amount = next(amount for bucket, amount in needs if bucket is refusing)
            raise self._refusal(exchange, entry, refusing, amount, now)
        if len(taken.needs) < len(needs):
            held = [bucket for bucket, _ in taken.needs]
            self._observe([bucket for bucket, _ in needs if bucket not in held])
        if exchange.stream and entry.fixed is None:
            self._run(exchange, taken)
        self._tell(exchange, entry, now)

    def _alone(self, exchange: Exchange, entry: Entry, needs: Needs, taken: Taken, now: float) -> None:
        refusing, short = take_share(needs, now, self._part)
        if refusing is not None:
            exchange.taken = None
            amount = next(amount for bucket, amount in needs if bucket is refusing)
            raise self._refusal(exchange, entry, refusing, amount, now)
        if short:
            self._observe(short)
            needs = [need for need in needs if need[0] not in short]
        taken.needs = needs
        taken.alone = True
        taken.source = "share"
        exchange.taken = taken
        if exchange.stream and entry.fixed is None:
            self._run(exchange, taken)
        self._tell(exchange, entry, now)

    def _observe(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            self.observed[bucket.name] = self.observed.get(bucket.name, 0) + 1

    # -- while it runs ------------------------------------------------------------------------------------------

    def _run(self, exchange: Exchange, taken: Taken) -> None:
        self._running[exchange] = taken
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """Charge streams that have used more than was reserved for them, so that nobody is admitted on what is gone."""
        self._timer = None
        for exchange, taken in self._running.items():
            meter = exchange.meter
            if meter is None or not meter.events:
                continue
            usage = meter.result(exchange.request_bytes // _BYTES_PER_TOKEN)
            cost = self._cost(usage, monotonic() - exchange.began_at, exchange.price)
            needs = list(taken.needs)
            for index, (bucket, amount) in enumerate(needs):
                used = used_of(bucket, usage.prompt, usage.completion, cost)
                if used is not None and used > amount:
                    self._charge(bucket, used - amount, taken.alone)
                    needs[index] = bucket, used
            taken.needs = needs
        if self._running:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    # -- after --------------------------------------------------------------------------------------------------

    def settle(self, exchange: Exchange) -> None:
        """Charge what was used instead of what was estimated, and free the slots. Synchronous, once for each request.

        A request that never used a model's tokens gets all of its estimate back.
        """
        taken: Taken | None = exchange.taken
        if taken is None:
            return
        exchange.taken = None
        entry = taken.entry
        needs, taken.needs = taken.needs, ()
        usage = exchange.usage
        prompt, completion, cost = 0, 0, 0.0  # type: tuple[int, int, float | None]
        if usage is not None:
            prompt, completion, cost = usage.prompt, usage.completion, exchange.cost
        if entry.fixed is None:
            if exchange.stream:
                self._running.pop(exchange, None)
            self._learn(exchange)
        uses = []
        for bucket, amount in needs:
            used = used_of(bucket, prompt, completion, cost)
            if bucket.kind == SLOTS:
                self._free(bucket, amount)
            elif used is not None and used != amount:
                self._charge(bucket, used - amount, taken.alone)
            if entry.fixed is None:
                uses.append(texts.use(bucket, amount, amount if used is None else used, taken.source))
        if needs is entry.fixed:
            exchange.limits = entry.uses[taken.source]
        elif taken.source:
            if len(needs) < len(entry.buckets):
                uses += _observed(entry, needs, prompt, completion, cost)
            exchange.limits = tuple(uses)

    def _learn(self, exchange: Exchange) -> None:
        usage = exchange.usage
        if usage is not None and not usage.estimated and exchange.principal is not None:
            choices = max(1, exchange.body.n) if exchange.body is not None else 1
            output = -(-usage.completion // choices)
            key_id = exchange.principal.key_id
            self.estimates.learn(key_id, exchange.model, exchange.request_bytes, usage.prompt, output)

    def _give_back(self, taken: Taken) -> None:
        needs, taken.needs = taken.needs, ()
        for bucket, amount in needs:
            self._free(bucket, amount) if bucket.kind == SLOTS else self._charge(bucket, -amount, taken.alone)

    def _charge(self, bucket: Bucket, amount: int, alone: bool) -> None:
        if self._shared is None or (alone and bucket.share is not None):
            if bucket.share is not None:
                arithmetic.charge(bucket.share, shared_out(bucket, self._part), amount)
            return
        if amount > 0:  # of what is on loan first: nothing is granted from a loan while its bucket is in debt
            lent = min(amount, bucket.loan)
            bucket.loan -= lent
            amount -= lent
            if not amount:
                return
        elif bucket.loan - amount <= bucket.lent and monotonic() < bucket.held_until:
            bucket.loan -= amount
            return
        bucket.owed += amount
        self._shared.owe(bucket)

    def _free(self, bucket: Bucket, slots: int) -> None:
        bucket.in_use -= slots
        if self._shared is None or not self._shared.up:
            return
        if bucket.loan < bucket.loan_max and monotonic() < bucket.held_until:
            bucket.loan += slots
        elif bucket.loan_max:
            self._shared.owe(bucket)
        else:
            self._shared.hurry(bucket)

    def _changed(self, up: bool) -> None:
        if not (self._buckets or self._limits):
            return
        if not up:
            _log.warning("limits are kept by this process alone while the store is away: %g of each", self._part)
            return
        assert self._shared is not None
        for bucket in self._buckets.values():
            if bucket.share is not None or bucket.kind == SLOTS or bucket.owed or bucket.sent:
                self._shared.owe(bucket)
        _log.info("limits are shared again")

    # -- which buckets ------------------------------------------------------------------------------------------

    def _entry(self, principal: Principal, route: str, model: str, unix_s: float) -> Entry:
        own = {limit.name for limit in principal.limits}
        buckets: list[Bucket] = []
        for limit in (*principal.limits, *(limit for limit in self._limits if limit.name not in own)):
            if not model and limit.resource != "requests":
                continue
            whom = _whom(limit, principal, route, model, own=limit.name in own)
            if whom is not None:
                buckets.append(self._bucket(limit, whom))
        until_unix_s = FOR_EVER
        if principal.budget is not None and model:
            budget, until_unix_s = self._budget(principal, unix_s)
            buckets.append(budget)
        if len(self._entries) >= _ENTRIES_MAX:
            self._forget()
        entry = self._entries[principal.key_id, route, model] = Entry(principal, tuple(buckets), until_unix_s)
        return entry

    def _bucket(self, limit: Limit, whom: tuple[str, ...]) -> Bucket:
        if limit.resource == "concurrent":
            life_ms = _SLOT_LIFE_MS
        else:
            life_ms = min(int(2 * limit.burst / limit.per_s * 1000) + _KEPT_MS, _YEARS_MS)
        key = self._key("limit", limit.name, limit.resource, *whom)
        found = self._buckets.get(key)
        if found is None:
            found = self._buckets[key] = Bucket(key, limit, None, life_ms)
        elif found.limit != limit:
            found.revise(Bucket(key, limit, None, life_ms))
        return found

    def _budget(self, principal: Principal, unix_s: float) -> tuple[Bucket, float]:
        budget = principal.budget
        assert budget is not None
        name, until_unix_s = period_of(budget.period, unix_s)
        life_ms = int((until_unix_s - unix_s + 2 * 86400) * 1000) if until_unix_s < FOR_EVER else 0
        key = self._key("budget", principal.key_id, budget.unit, budget.period, name)
        found = self._buckets.get(key)
        if found is None:
            found = self._buckets[key] = Bucket(key, None, budget, life_ms)
        elif found.budget != budget:
            found.revise(Bucket(key, None, budget, life_ms))
        return found, until_unix_s

    def _key(self, *parts: str) -> str:
        return self._store.key(*parts) if self._store is not None else "\0".join(parts)

    def _forget(self) -> None:
        """Drop the entries and every bucket that is as one would be made new."""
        self._entries.clear()
        now_us = int(monotonic() * MICRO)
        for key, bucket in list(self._buckets.items()):
            if self._shared is None and bucket.share is not None and bucket.kind != BUDGET and not bucket.in_use:
                arithmetic.refill(bucket.share, bucket.rules, now_us)
                if bucket.kind == SLOTS or bucket.share.level >= bucket.rules.burst:
                    bucket.share = None
            if bucket.idle():
                del self._buckets[key]

    # -- what the client is told --------------------------------------------------------------------------------

    def _tell(self, exchange: Exchange, entry: Entry, now: float) -> None:
        """The x-ratelimit headers, of the scarcest limit of requests and of tokens."""
        for buckets, lines in ((entry.requests, _REQUESTS), (entry.tokens, _TOKENS)):
            if not buckets:
                continue
            bucket = buckets[0] if len(buckets) == 1 else min(buckets, key=lambda one: one.known(now) / one.rules.burst)
            left = bucket.known(now)
            left = left if left > 0 else 0
            rules = bucket.rules
            missing = rules.burst - left
            reset = b"0s" if not missing else reset_text(-(-missing // rules.rate)).encode()
            exchange.headers += lines % (rules.burst // MICRO, left // MICRO, reset)

    def _refusal(self, exchange: Exchange, entry: Entry, bucket: Bucket, amount: int, now: float) -> GatewayError:
        self._tell(exchange, entry, now)
        scope = bucket.limit.scope if bucket.limit is not None else "key"
        label = (bucket.name, scope)
        self.refused[label] = self.refused.get(label, 0) + 1
        exchange.limits = (texts.use(bucket, amount, 0, "refused"),)
        return texts.refusal(bucket, amount, bucket.known(now), exchange.began_unix_s)


def _observed(entry: Entry, taken: Needs, prompt: int, completion: int, cost: float | None) -> Iterator[LimitUse]:
    """What the record says of limits that had not enough, and were only observed."""
    held = [bucket for bucket, _ in taken]
    for bucket in entry.buckets:
        if bucket not in held:
            used = used_of(bucket, prompt, completion, cost)
            yield texts.use(bucket, 0, bucket.unit if used is None else used, "observed")


def _whom(limit: Limit, principal: Principal, route: str, model: str, *, own: bool) -> tuple[str, ...] | None:
    """What a bucket's name adds to the limit's; None if the limit does not apply. A key's own limits are its alone."""
    scope = limit.scope
    if scope == "key_model":
        return (scope, principal.key_id, model) if model else None
    if scope == "key_endpoint":
        return scope, principal.key_id, route
    if own:
        return "own", principal.key_id
    if scope == "group":
        return (scope, principal.group) if principal.group else None
    return (scope, principal.key_id) if scope == "key" else (scope,)
