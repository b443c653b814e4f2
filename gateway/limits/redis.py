"""The store's side: batches of decisions, one script call in flight at a time for each process.

What waits for the store while a call is under way goes along with the next one: its requests are decided together, in
their order, and share the round trip. With each call a process says what it holds of every bucket named in it, which
replaces what it said before, and the last call it has an answer of: what a lost one took is refilled, and of a budget
it is put back with the next one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from importlib.resources import files
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from gateway.limits.local import BUDGET, SLOTS, Bucket, Needs, take_loaned, together_again
from gateway.store.client import REQUEST_TIMEOUT_S, Store, StoreAway, StoreError
from gateway.store.scripts import Script

if TYPE_CHECKING:
    from gateway.limits.limiter import Taken

TAKE: Final = Script("take", files("gateway.limits").joinpath("take.lua").read_text(encoding="utf-8"))

#: how long the store keeps what a process holds, unless the process is heard of again
LOAN_S: Final = 10.0
#: how long the process uses it: less, for two clocks, and counted from before it asked
USE_S: Final = 8.0
RENEW_S: Final = 3.0
#: a loan that was not touched so long is given back
IDLE_S: Final = 0.5
#: charges and refunds are told the store together, so often
TICK_S: Final = 0.1
#: how long a refusal is repeated without asking again: others may have given something back
_EMPTY_MAX_S: Final = 0.02
_FLUSH_TIMEOUT_S: Final = 0.25
_BATCH: Final = 128
_BUCKETS_MAX: Final = 400


class Ask:
    """One request's needs on the way to the store. `done` gives the bucket that refuses, or None."""

    __slots__ = ("done", "needs", "taken")

    def __init__(self, needs: Needs, taken: Taken, done: asyncio.Future[Bucket | None]) -> None:
        self.needs = needs
        self.taken = taken
        self.done = done


class Shared:
    """Buckets in the store, for one process, which grants `part` of each by itself while the store is away.

    `give_back` is told of what was taken for a request that has gone.
    """

    def __init__(self, store: Store, part: float, give_back: Callable[[Taken], None]) -> None:
        self._store = store
        self.part = part
        self._give_back = give_back
        self._process = os.urandom(6).hex()
        self._waiting: list[Ask] = []
        self._due: dict[str, Bucket] = {}  # to be told the store at the next tick
        self._held: dict[str, Bucket] = {}  # something of them is on loan or in use
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.calls = 0

    @property
    def up(self) -> bool:
        return self._store.up

    def ask(self, needs: Needs, taken: Taken) -> asyncio.Future[Bucket | None]:
        """Take the needs in the store. Raises StoreAway through the future if there is no deciding there."""
        done: asyncio.Future[Bucket | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(Ask(needs, taken, done))
        self._run()
        return done

    def owe(self, bucket: Bucket) -> None:
        """The bucket has something to tell the store, within a tick."""
        self._due[bucket.key] = bucket
        self._arm()

    def hurry(self, bucket: Bucket) -> None:
        """The bucket has something to tell that others wait for: a slot that is free."""
        self._due[bucket.key] = bucket
        self._run()

    async def flush(self) -> bool:
        """Give everything on loan back and tell all charges. False if the store is away: they are lost then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            await asyncio.wait((self._task,))
        self._due |= self._held
        while self._due:
            if not await self._call([], self._take_due(), lend=False, timeout_s=_FLUSH_TIMEOUT_S):
                return False
        return True

    # -- the one call at a time ---------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._pump(), name="limits")

    async def _pump(self) -> None:
        try:
            while self._waiting or self._due:
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                # What the last call borrowed is there for those who came meanwhile.
                now = monotonic()
                batch = [ask for ask in batch if not self._granted(ask, now)]
                buckets = self._take_due()
                if not (batch or buckets):
                    continue
                for ask in batch:
                    for bucket, _ in ask.needs:
                        buckets[bucket.key] = bucket
                if not await self._call(batch, buckets):
                    break
        finally:
            self._task = None
            self._arm()

    def _granted(self, ask: Ask, now: float) -> bool:
        """Whether the request need not be asked for any more: what is on loan suffices, or its client has left."""
        if ask.done.done():
            return True
        if not take_loaned(ask.needs, now, self.owe):
            return False
        ask.taken.needs = ask.needs
        ask.done.set_result(None)
        return True

    def _take_due(self) -> dict[str, Bucket]:
        due = self._due
        if len(due) <= _BUCKETS_MAX:
            self._due = {}
            return due
        some = dict(islice(due.items(), _BUCKETS_MAX))
        for key in some:
            del due[key]
        return some

    async def _call(
        self, batch: list[Ask], buckets: dict[str, Bucket], *, lend: bool = True, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> bool:
        now = monotonic()
        index = {key: number for number, key in enumerate(buckets, 1)}
        largest: dict[str, int] = {}
        for ask in batch:
            for bucket, amount in ask.needs:
                largest[bucket.key] = max(largest.get(bucket.key, 0), amount)
        self.calls += 1
        number = self.calls
        args: list[Any] = [self._process, int(LOAN_S * 1e6), number]
        for bucket in buckets.values():
            need = asked = largest.get(bucket.key, 0)
            if asked:
                bucket.need = asked
            elif lend and now - bucket.used_at < IDLE_S:
                need = bucket.need  # it is in use, and only told something else
            aim = bucket.aim(need, now) if need else 0
            args += _told(bucket, aim, now, self.part, number, keep=not asked)
        args.append(len(batch))
        for ask in batch:
            args.append(len(ask.needs))
            for bucket, amount in ask.needs:
                args += (index[bucket.key], amount)
        try:
            levels, loans, verdicts = await self._store.run(TAKE, list(buckets), args, timeout_s=timeout_s)
        except (StoreAway, StoreError) as error:
            self._failed(error, batch, buckets.values())
            return False
        for bucket, level, loan in zip(buckets.values(), levels, loans, strict=True):
            bucket.sent = bucket.told = 0
            bucket.heard = number
            bucket.level, bucket.level_at = int(level), now
            bucket.loan += int(loan)
            bucket.lent += int(loan)
            bucket.low = bucket.lent // 2
            bucket.ceiling = -1
            bucket.asked_at, bucket.held_until = now, now + USE_S
            if bucket.loan or bucket.in_use:
                self._held[bucket.key] = bucket
            else:
                self._held.pop(bucket.key, None)
            if bucket.owed:
                self._due[bucket.key] = bucket
        by_number = list(buckets.values())
        for ask, verdict in zip(batch, verdicts, strict=True):
            self._decide(ask, verdict, by_number, now)
        return True

    def _decide(self, ask: Ask, verdict: list[int], buckets: list[Bucket], now: float) -> None:
        refusing = buckets[verdict[0] - 1] if verdict[0] else None
        if refusing is None:
            short = [buckets[number - 1] for number in verdict[1:]]
            ask.taken.needs = [need for need in ask.needs if need[0] not in short] if short else ask.needs
            for bucket, amount in ask.taken.needs:
                bucket.used_at = now
                if bucket.kind == SLOTS:
                    bucket.in_use += amount
                    self._held[bucket.key] = bucket
            if ask.done.done():  # the client left while the store decided
                self._give_back(ask.taken)
                return
        elif refusing.kind != SLOTS and not refusing.owed:
            amount = next(amount for bucket, amount in ask.needs if bucket is refusing)
            refusing.empty_amount = amount
            refusing.empty_until = now + _EMPTY_MAX_S
        if not ask.done.done():
            ask.done.set_result(refusing)

    def _failed(self, error: Exception, batch: list[Ask], buckets: Iterable[Bucket]) -> None:
        """Nobody knows whether the call was heard: what it asked for is gone, its charges will be told again."""
        for bucket in buckets:
            if bucket.kind == BUDGET:  # it will be undone, and so what was returned with it is held still
                bucket.loan += bucket.told
                bucket.lent, bucket.told = bucket.loan, 0
            if bucket.sent or bucket.owed or bucket.in_use or bucket.kind == BUDGET:
                self._due[bucket.key] = bucket
            if not (bucket.in_use or bucket.loan):
                self._held.pop(bucket.key, None)
        waiting, self._waiting = [*batch, *self._waiting], []
        for ask in waiting:
            if not ask.done.done():
                ask.done.set_exception(error)

    # -- the tick -----------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        if self._timer is None and (self._due or self._held):
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._store.up:
            now = monotonic()
            for bucket in self._held.values():
                idle = bucket.loan and now - bucket.used_at > IDLE_S
                renew = now - bucket.asked_at > RENEW_S
                if idle or renew:
                    self._due[bucket.key] = bucket
            if self._due:
                self._run()
                return
        self._arm()


def _told(bucket: Bucket, aim: int, now: float, part: float, number: int, *, keep: bool) -> tuple[int, ...]:
    """What the script is told of a bucket that should have `aim` on loan, in this process's call `number`.

    `keep`: what is on loan stays here, and requests take from it while the store is asked for more. It is returned, and
    gone from here, where a request asks (what was left may be just what it lacks), where nothing is wanted any more,
    and where its time is over.
    """
    rules = bucket.rules
    if bucket.share is not None:  # this process was on its own: what it granted is missing in the store
        together_again(bucket, now, part)
    fresh = now < bucket.held_until
    keep = keep and aim > 0 and fresh
    if bucket.kind == SLOTS:
        held = bucket.in_use + (bucket.loan if keep else 0)
    else:
        held = bucket.loan if fresh or bucket.kind == BUDGET else 0  # nothing refills what a budget has lent
    bucket.told = 0
    if not keep:
        bucket.told, bucket.loan = held, 0
    if bucket.heard < 0:
        bucket.heard = number - 1
    # From now on the store may think that so much is held: no more is put back to the loan than is used of it.
    bucket.lent = bucket.loan
    bucket.low = 0
    if not bucket.sent and bucket.owed:
        bucket.sent, bucket.owed = bucket.owed, 0
        bucket.seq = number  # grows also where the bucket was forgotten here, and not in the store
    return (
        *(rules.burst, rules.rate, rules.debt, bucket.kind, held, bucket.seq, bucket.sent, bucket.ceiling),
        *(max(0, aim - bucket.loan), int(bucket.observe), bucket.life_ms, int(keep), bucket.heard),
    )
