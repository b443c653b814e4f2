"""Who is served next while engines are full: a virtual token counter queue (Sheng et al., OSDI 2024), pure.

Each tenant has a counter, which grows by `input_weight` for each prompt token and `output_weight` for each token of an
answer, divided by the tenant's weight. A place that becomes free goes to the tenant with the smallest counter that
waits for it, and within the tenant to who waits longest. A tenant that begins to wait is lifted to those that do
already, so nobody saves up by being idle. Between two tenants that both wait, the counters differ by no more than what
one may have running. Priority classes stand above it, each with counters of its own.

Two things make a tenant that stays within its share feel little of one that floods (docs/decisions.md has figures).
Who comes back keeps a credit: what its share makes in `credit_s`, so that a few requests at once need not alternate
with the flood's. And the last free places are kept for those who have credit left, while more than one tenant is about.

A place is whatever has room for one more: an upstream. A turn names all the places that would do for it; turns that
name the same ones stand in one lane, and lanes that share a place are in one contest, where counters are compared.
A contest lasts as long as somebody waits in it: with nobody waiting nothing is kept, and charging is a look-up. So
what was used while there was room for all is held against nobody, and memory is bounded by who waits now.

Every operation is O(log n) in the turns and tenants, times the lanes of a contest where they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import count
from math import ceil, inf
from typing import Final

from gateway.queueing.contest import PRIORITIES, Account, Backlog, Contest, Grade, Lane, Turn, order_of
from gateway.queueing.heap import Heap

__all__ = ["PRIORITIES", "FairQueue", "Turn"]

#: so long after another tenant was served, places are kept for such
OTHERS_S: Final = 30.0


class FairQueue:
    """The queue of all who wait. At most `most` do: `enter` gives back the turn that must go.

    Times are seconds of whatever clock the caller has. `spare` is given the places of a contest, and says how many more
    may be taken by those who have no credit; without it all may, and no place is free while somebody wants it.
    """

    def __init__(
        self,
        most: int = 1000,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        credit_s: float = 0.0,
        spare: Callable[[Collection[Hashable]], int] | None = None,
    ) -> None:
        self.most = most
        self.credit_s = credit_s
        self.spare = spare
        self.input_weight = input_weight
        self.output_weight = output_weight
        self._contests: dict[Hashable, Contest] = {}  # by place
        self._deadlines: Heap[Turn] = Heap()
        self._longest: list[Heap[Account]] = [Heap() for _ in PRIORITIES]
        self._order = count(1).__next__

    def __len__(self) -> int:
        return len(self._deadlines)

    def depth(self, rank: int) -> int:
        """How many of this class wait."""
        return sum(contest.grades[rank].waiting for contest in self._all())

    def tenants(self) -> int:
        """How many tenants wait."""
        return sum(len(heap) for heap in self._longest)

    def wanted(self, place: Hashable) -> bool:
        """Whether somebody waits who would take `place`, or one that is contested together with it."""
        return place in self._contests

    def cost(self, input_tokens: int, output_tokens: int = 0) -> float:
        return self.input_weight * input_tokens + self.output_weight * output_tokens

    # -- waiting ------------------------------------------------------------------------------------------------

    def enter(self, turn: Turn, now: float) -> Turn | None:
        """Let `turn` wait. Gives the turn that is shed for it, which may be itself, or None while there is room.

        Shed is the newest turn of whoever has the most waiting for its weight, in the lowest class that waits: one
        who floods the queue pushes out its own.
        """
        turn.order = self._order()
        self._add(turn, self._contest(turn.places, now), lift=True)
        if len(self._deadlines) <= self.most:
            return None
        for heap in reversed(self._longest):
            account = heap.first()
            if account is not None:
                shed = max((next(reversed(one.turns)) for one in account.backlogs.values()), key=order_of)
                self.leave(shed)
                return shed
        return None

    def put_back(self, turn: Turn, now: float) -> None:
        """Let a turn that left wait again, where it stood, for other `places`."""
        self._add(turn, self._contest(turn.places, now), lift=True)

    def leave(self, turn: Turn) -> bool:
        """Stop waiting; False if it did not."""
        backlog = turn.backlog
        if backlog is None:
            return False
        turn.backlog = None
        account, grade, lane = backlog.account, backlog.grade, backlog.lane
        self._deadlines.drop(turn)
        del backlog.turns[turn]
        account.waiting -= 1
        if backlog.turns:
            lane.backlogs.set(backlog, backlog.key())
        else:
            lane.backlogs.drop(backlog)
            del account.backlogs[lane.places]
            if not lane.backlogs:
                del grade.lanes[lane.places]
        self._rank_length(turn.rank, account)
        if not account.waiting:
            grade.weights -= account.weight
            grade.place(account)
            grade.forget()
        contest = self._contests[next(iter(lane.places))]
        grade.waiting -= 1
        contest.waiting -= 1
        if not grade.waiting:
            contest.grades[turn.rank] = Grade()
        if not contest.waiting:
            for place in contest.places:
                del self._contests[place]
        return True

    def next(self, place: Hashable, now: float) -> Turn | None:
        """Serve whoever is next for `place`, and charge what it costs to begin; None if nobody wants it."""
        contest = self._contests.get(place)
        if contest is None:
            return None
        for grade in contest.grades:
            found: Backlog | None = None
            for lane in grade.lanes.values():
                if place in lane.places:
                    first = lane.backlogs.first()
                    if first is not None and (found is None or first.key() < found.key()):
                        found = first
            if found is not None:
                turn = found.head()
                account = found.account
                others = account.counter > grade.floor and now - grade.others_at < OTHERS_S
                if others and self.spare is not None and self.spare(contest.places) <= 0:
                    return None  # kept for them
                if turn.tenant != grade.served:
                    grade.others_at = now if grade.served else -inf
                    grade.served = turn.tenant
                grade.floor = max(grade.floor, account.counter)
                grade.forget()
                contest.moved(now)
                contest.spent += turn.cost
                grade.credit = contest.credit(now, grade.weights, self.credit_s)
                grade.charge(turn.tenant, turn.weight, turn.cost)
                self.leave(turn)
                return turn
        return None

    def expired(self, now: float) -> list[Turn]:
        """Turns whose deadline has passed; they wait no more."""
        found = []
        while (turn := self._deadlines.first()) is not None and turn.deadline_at <= now:
            self.leave(turn)
            found.append(turn)
        return found

    def next_deadline(self) -> float | None:
        """When the first deadline of those who wait is over; None if nobody waits."""
        turn = self._deadlines.first()
        return None if turn is None else turn.deadline_at

    # -- accounting ---------------------------------------------------------------------------------------------

    def charge(self, place: Hashable, rank: int, tenant: str, weight: float, cost: float) -> None:
        """`tenant` used `cost` at `place`; below zero gives back. Held against it only while somebody waits."""
        contest = self._contests.get(place)
        if contest is not None and contest.grades[rank].waiting:
            contest.spent += cost
            contest.grades[rank].charge(tenant, weight, cost)

    # -- what is told -------------------------------------------------------------------------------------------

    def wait_s(self, tenant: str, places: Sequence[Hashable], rank: int, weight: float, now: float) -> float:
        """How long a turn of `tenant` would wait if it came now, by the pace of those before it. 0 if nobody waits."""
        contest = next((self._contests[place] for place in places if place in self._contests), None)
        if contest is None:
            return 0.0
        grade = contest.grades[rank]
        account = grade.accounts.get(tenant)
        own = account.waiting if account is not None else 0
        others = grade.weights - (weight if own else 0.0)
        same = min(float(grade.waiting), own + ceil((own + 1) * others / weight))
        return (sum(one.waiting for one in contest.grades[:rank]) + same + 1) * contest.pace_s(now)

    def upcoming(self) -> Iterator[Turn]:
        """Everyone who waits, in the order in which they are served if nobody comes and nothing more is charged."""
        for contest in self._all():
            for grade in contest.grades:
                yield from grade.upcoming()

    # -- inside -------------------------------------------------------------------------------------------------

    def _all(self) -> list[Contest]:
        return list(dict.fromkeys(self._contests.values()))

    def _contest(self, places: frozenset[Hashable], now: float) -> Contest:
        """The contest of these places: a new one, the one there is, or several that become one by this lane."""
        met = list(dict.fromkeys(self._contests[place] for place in places if place in self._contests))
        into = max(met, key=lambda one: one.waiting) if met else Contest(now)
        for place in places:
            self._contests.setdefault(place, into)
            if self._contests[place] is into:
                into.places.add(place)
        for other in met:
            if other is not into:
                self._join(into, other)
        return into

    def _join(self, into: Contest, other: Contest) -> None:
        """Put two contests together. Their counters have nothing to do with each other, so the levels are made one."""
        into.places |= other.places
        into.spent += other.spent
        for place in other.places:
            self._contests[place] = into
        for rank, grade in enumerate(other.grades):
            target = into.grades[rank]
            offset = target.lowest() - grade.lowest()
            turns = [
                turn for account in grade.accounts.values() for one in account.backlogs.values() for turn in one.turns
            ]
            for account in grade.accounts.values():
                self._longest[rank].drop(account)
                counter = account.counter + offset
                known = target.accounts.get(account.tenant)
                if known is None:
                    known = target.accounts[account.tenant] = Account(account.tenant, counter, account.weight)
                known.counter = max(known.counter, counter)
                target.place(known)
            target.floor = max(target.floor, grade.floor + offset)
            for turn in turns:
                self._add(turn, into, lift=False)
            target.forget()

    def _add(self, turn: Turn, contest: Contest, *, lift: bool) -> None:
        grade = contest.grades[turn.rank]
        level = grade.level(turn.places) if lift else 0.0
        account = grade.accounts.get(turn.tenant)
        if account is None:
            account = grade.accounts[turn.tenant] = Account(turn.tenant, level, turn.weight)
        elif turn.places not in account.backlogs:
            account.counter = max(account.counter, level)
        if not account.waiting:
            account.weight = turn.weight  # as it is configured now
            grade.debtors.drop(account)
            grade.weights += account.weight
        lane = grade.lanes.get(turn.places)
        if lane is None:
            lane = grade.lanes[turn.places] = Lane(turn.places)
        backlog = account.backlogs.get(turn.places)
        if backlog is None:
            backlog = account.backlogs[turn.places] = Backlog(account, grade, lane)
        backlog.turns[turn] = None
        turn.backlog = backlog
        account.waiting += 1
        grade.place(account)
        grade.waiting += 1
        contest.waiting += 1
        self._deadlines.set(turn, (turn.deadline_at, turn.order))
        self._rank_length(turn.rank, account)

    def _rank_length(self, rank: int, account: Account) -> None:
        """Where the account stands among those with the longest backlogs; of equal ones, who grew last is first."""
        if account.waiting:
            self._longest[rank].set(account, (-account.waiting / account.weight, -float(self._order())))
        else:
            self._longest[rank].drop(account)
