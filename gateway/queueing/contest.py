"""What the fair queue (`fair`) is made of: turns, the accounts of tenants, lanes, and contests.

Turns that name the same places stand in one lane. Lanes that share a place, directly or through others, are in one
contest; each class of it (`Grade`) has counters of its own, which are compared across its lanes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Final

from gateway.queueing.heap import Heap, Key

#: the classes, first served first; a rank is an index of it
PRIORITIES: Final = ("high", "normal", "low")
#: tenants that do not wait and have used more than their share, remembered in one class of a contest
DEBTORS_MAX: Final = 2_000
#: how much the latest gap between two turns counts in the mean
_SMOOTHING: Final = 0.1
#: what was charged longer ago than this counts half
_MEMORY_S: Final = 30.0


class Turn:
    """One request's wait. `cost` is charged when it is served; `of` is the caller's own, not looked at."""

    __slots__ = ("backlog", "cost", "deadline_at", "of", "order", "places", "queued_at", "rank", "tenant", "weight")

    def __init__(
        self,
        tenant: str,
        places: Iterable[Hashable],
        queued_at: float,
        *,
        rank: int = 1,
        weight: float = 1.0,
        cost: float = 0.0,
        deadline_at: float = inf,
        of: Any = None,
    ) -> None:
        self.tenant = tenant
        self.places = frozenset(places)
        self.queued_at = queued_at
        self.rank = rank
        self.weight = weight
        self.cost = cost
        self.deadline_at = deadline_at
        self.of = of
        self.order = 0
        self.backlog: Backlog | None = None  # while it waits

    def __repr__(self) -> str:
        return f"<Turn {self.tenant} {PRIORITIES[self.rank]}{' waiting' if self.backlog is not None else ''}>"


class Account:
    """A tenant in one class of a contest."""

    __slots__ = ("backlogs", "counter", "tenant", "waiting", "weight")

    def __init__(self, tenant: str, counter: float, weight: float) -> None:
        self.tenant = tenant
        self.counter = counter
        self.weight = weight
        self.waiting = 0
        self.backlogs: dict[frozenset[Hashable], Backlog] = {}


class Backlog:
    """The turns of one account in one lane, oldest first. Never empty while it is in the lane."""

    __slots__ = ("account", "grade", "lane", "turns")

    def __init__(self, account: Account, grade: Grade, lane: Lane) -> None:
        self.account = account
        self.grade = grade
        self.lane = lane
        self.turns: OrderedDict[Turn, None] = OrderedDict()

    def head(self) -> Turn:
        return next(iter(self.turns))

    def key(self) -> Key:
        return self.account.counter, self.head().order


class Lane:
    """Those who would take the same places."""

    __slots__ = ("backlogs", "places")

    def __init__(self, places: frozenset[Hashable]) -> None:
        self.places = places
        self.backlogs: Heap[Backlog] = Heap()


class Grade:
    """One class of a contest. `floor` is the highest counter that was served. Who comes back begins no more than
    `credit` below it, or where the least of its lane is if that is lower still.
    """

    __slots__ = ("accounts", "credit", "debtors", "floor", "lanes", "others_at", "served", "waiting", "weights")

    def __init__(self) -> None:
        self.credit = 0.0
        self.served = ""  # the tenant served last, and when that changed last
        self.others_at = -inf
        self.accounts: dict[str, Account] = {}
        self.lanes: dict[frozenset[Hashable], Lane] = {}
        self.debtors: Heap[Account] = Heap()  # those that do not wait
        self.floor = 0.0
        self.waiting = 0
        self.weights = 0.0  # of the accounts that wait

    def level(self, places: frozenset[Hashable]) -> float:
        """Where a tenant enters the lane of `places` at the least. Credit is given once: not below one who has it."""
        lane = self.lanes.get(places)
        first = lane.backlogs.first() if lane is not None else None
        return (self.floor if first is None else min(self.floor, first.account.counter + self.credit)) - self.credit

    def charge(self, tenant: str, weight: float, cost: float) -> None:
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = Account(tenant, self.floor - self.credit, weight)
        account.counter += cost / weight
        self.place(account)
        if not account.waiting:
            self.forget()

    def place(self, account: Account) -> None:
        """Put the account where its counter belongs: in the lanes where it waits, or among those that do not."""
        for backlog in account.backlogs.values():
            backlog.lane.backlogs.set(backlog, backlog.key())
        if not account.waiting:
            self.debtors.set(account, (account.counter, 0.0))

    def forget(self) -> None:
        """Let go of who owes nothing: on return the floor, or the least of those who wait, is where they would be."""
        while (debtor := self.debtors.first()) is not None:
            if debtor.counter > self.floor - self.credit and len(self.debtors) <= DEBTORS_MAX:
                return
            self.debtors.drop(debtor)
            del self.accounts[debtor.tenant]

    def lowest(self) -> float:
        """The smallest counter of those who wait, or else the floor."""
        return min((one.counter for one in self.accounts.values() if one.waiting), default=self.floor)

    def turns(self) -> list[Turn]:
        """Everyone in this class, in order of arrival."""
        found = [turn for one in self.accounts.values() for backlog in one.backlogs.values() for turn in backlog.turns]
        return sorted(found, key=order_of)

    def upcoming(self) -> Iterator[Turn]:
        """The turns as they would be served, were all places alike."""
        counters = {tenant: account.counter for tenant, account in self.accounts.items()}
        waiting: dict[str, deque[Turn]] = {}
        for turn in self.turns():
            waiting.setdefault(turn.tenant, deque()).append(turn)
        heads = [(counters[tenant], turns[0].order, turns.popleft()) for tenant, turns in waiting.items()]
        heapify(heads)
        while heads:
            _, _, turn = heappop(heads)
            yield turn
            counters[turn.tenant] += turn.cost / turn.weight
            if turns := waiting[turn.tenant]:
                heappush(heads, (counters[turn.tenant], turns[0].order, turns.popleft()))


class Contest:
    """Lanes that share places, directly or through others, and how fast they move."""

    __slots__ = ("gap_s", "grades", "moved_at", "places", "since", "spent", "waiting")

    def __init__(self, now: float) -> None:
        self.places: set[Hashable] = set()
        self.grades: list[Grade] = [Grade() for _ in PRIORITIES]
        self.spent = 0.0  # charged to anybody, `since` when
        self.since = now
        self.waiting = 0
        self.moved_at = now
        self.gap_s = 0.0  # mean time between two turns served; 0 before the first

    def moved(self, now: float) -> None:
        """A turn was served."""
        gap_s = now - self.moved_at
        self.gap_s = self.gap_s + _SMOOTHING * (gap_s - self.gap_s) if self.gap_s else gap_s
        self.moved_at = now

    def credit(self, now: float, weights: float, credit_s: float) -> float:
        """What a tenant of weight 1 would get in `credit_s`, beside others of `weights`."""
        elapsed_s = now - self.since
        if elapsed_s > _MEMORY_S:
            self.spent /= 2
            elapsed_s /= 2
            self.since = now - elapsed_s
        return max(0.0, self.spent) * min(1.0, credit_s / elapsed_s if elapsed_s else 1.0) / (weights + 1.0)

    def pace_s(self, now: float) -> float:
        """Seconds between two turns served. A contest that has come to a halt is not as fast as it was."""
        return max(self.gap_s, now - self.moved_at)


def order_of(turn: Turn) -> int:
    return turn.order
