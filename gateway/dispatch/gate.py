"""gate: how many requests an upstream has at once, and the queue of those that find no room.

An upstream takes as many as its `limit` says. While one of those a request may go to has room and nobody waits for it,
the gate is a comparison. Else the request waits for its turn in the fair queue (`gateway.queueing.fair`), among all who
would take one of the same upstreams, whatever model they ask for.

A lease that ends hands its room to whose turn it is, right there: the room is held for that one (`Upstream.held`)
until it takes its own lease, so no newcomer takes it and no two are woken for it. While anybody waits, a tick does what
no lease tells of: deadlines, upstreams that came back or were ejected, limits that changed; and it charges the tokens
that running answers have made so far to their tenants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.catalog import Offer
from gateway.errors import NoCapacity
from gateway.exchange import Exchange
from gateway.metrics import QueueSeries
from gateway.queueing.fair import PRIORITIES, FairQueue, Turn
from gateway.routing.eligible import eligible
from gateway.upstreams.upstream import Upstream

if TYPE_CHECKING:
    from gateway.identity.principals import Principal

TICK_S: Final = 0.25
#: English text and JSON run at about four bytes a token
_BYTES_PER_TOKEN: Final = 4
_NEVER_S: Final = 600.0
#: who comes back may use at once what its share makes in this time
CREDIT_S: Final = 3.0
#: places are kept for those within their share only where they are no more than this part of all
RESERVE_PART: Final = 0.05


class Waiting:
    """What the gate keeps of a request that waits. `woken` gives the upstream that has room for it, or None: those it
    waited for are no longer to be asked.
    """

    __slots__ = ("exchange", "group", "woken")

    def __init__(self, exchange: Exchange, group: Group) -> None:
        self.exchange = exchange
        self.group = group
        self.woken: asyncio.Future[Upstream | None] = asyncio.get_running_loop().create_future()


class Group:
    """Requests that wait for the same offers: looked at together, however many they are."""

    __slots__ = ("places", "tier", "tried", "turns")

    def __init__(self, tier: Sequence[Offer], tried: tuple[Upstream, ...], places: frozenset[Upstream]) -> None:
        self.tier = tier
        self.tried = tried
        self.places = places
        self.turns: dict[Turn, None] = {}


class Gate:
    """See the module's docstring. `longest_s` is the longest wait, `weights` are the shares of groups."""

    def __init__(self, queue: FairQueue, longest_s: float = 60.0, weights: Mapping[str, float] | None = None) -> None:
        self.queue = queue
        self.series = QueueSeries(lambda: [queue.depth(rank) for rank in range(len(PRIORITIES))], queue.tenants)
        self._longest_s = longest_s
        self._weights = weights or {}
        self._reserve = 0
        queue.credit_s = CREDIT_S
        queue.spare = self._spare
        #: by their tier and what they have tried of it
        self._groups: dict[tuple[tuple[Offer, ...], tuple[Upstream, ...]], Group] = {}
        self._running: dict[Exchange, Upstream] = {}  # on upstreams that have a limit
        self._charged: dict[Exchange, float] = {}  # of those, what their tenants were charged since somebody waits
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def revise(self, longest_s: float, weights: Mapping[str, float], reserve: int) -> None:
        """Go on with other settings. `reserve`: places that are kept for tenants within their share."""
        self._longest_s = longest_s
        self._weights = weights
        self._reserve = reserve

    # -- asked by each request ----------------------------------------------------------------------------------

    def room(self, ready: Sequence[Offer]) -> Sequence[Offer]:
        """Those of `ready` that take one more now, and for which nobody waits; `ready` itself if they all do."""
        for offer in ready:
            upstream = offer.upstream
            if upstream.on_room is not None or not upstream.has_room():
                return [one for one in ready if self._open(one.upstream)]
        return ready

    def _open(self, upstream: Upstream) -> bool:
        return upstream.has_room() and (upstream.on_room is None or not self.queue.wanted(upstream))

    def began(self, exchange: Exchange, upstream: Upstream) -> None:
        """The request has its lease on `upstream`, which has a limit. Told for each attempt."""
        first = exchange not in self._running
        self._running[exchange] = upstream
        if first and exchange not in self._charged and upstream.on_room is not None:
            cost = self.queue.cost(_prompt_tokens(exchange))
            self._charge(exchange, upstream, cost)
            self._charged[exchange] = cost

    def ended(self, exchange: Exchange) -> None:
        """The request is over, and its usage is known."""
        upstream = self._running.pop(exchange, None)
        charged = self._charged.pop(exchange, None)
        if upstream is not None and charged is not None:
            usage = exchange.usage
            self._charge(
                exchange, upstream, (self.queue.cost(usage.prompt, usage.completion) if usage else 0.0) - charged
            )

    # -- waiting ------------------------------------------------------------------------------------------------

    async def wait(
        self, exchange: Exchange, tier: tuple[Offer, ...], tried: tuple[Upstream, ...], ready: Sequence[Offer]
    ) -> Sequence[Offer]:
        """Wait for room at one of `ready`, the offers of `tier` that may be asked now; gives the offers there.

        The caller takes its lease before it awaits anything. Empty if none of the tier may be asked any more. Raises
        NoCapacity when the deadline has passed, when the request is shed, or at once where nobody may wait.
        """
        now = monotonic()
        principal: Principal | None = exchange.principal
        tenant, weight = self._tenant(principal)
        left_s = self._longest_s - exchange.queued_s
        if self._closed or left_s <= 0:
            raise self._refusal("closed" if self._closed else "deadline", exchange, ready, now)
        exchange.model = ready[0].model.name
        group = self._groups.get((tier, tried))
        if group is None:
            group = self._groups[tier, tried] = Group(tier, tried, frozenset(offer.upstream for offer in ready))
        waiting = Waiting(exchange, group)
        turn = Turn(
            tenant,
            group.places,
            now,
            rank=exchange.rank,
            weight=weight,
            cost=0.0 if exchange in self._charged else self.queue.cost(_prompt_tokens(exchange)),
            deadline_at=now + left_s,
            of=waiting,
        )
        group.turns[turn] = None
        if not len(self.queue):
            self._charged.clear()  # what was made before anybody waited is held against nobody
        shed = self.queue.enter(turn, now)
        if shed is not None:
            self._refuse(shed, "full", now)
        for place in group.places:
            place.on_room = self._released
            self._released(place)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(min(TICK_S, left_s), self._tick)
        try:
            given = await waiting.woken
        except BaseException:
            if not self._forget(turn) and not waiting.woken.cancelled() and waiting.woken.exception() is None:
                unused = waiting.woken.result()
                if unused is not None:  # room came in the very moment the client left: it is the next one's
                    unused.held -= 1
                    self._released(unused)
            raise
        finally:
            waited_s = monotonic() - now
            exchange.queued_s += waited_s
            self.series.waits.observe(waited_s)
        if given is None:
            return ()
        given.held -= 1
        if turn.cost:
            self._charged[exchange] = turn.cost
        return [offer for offer in tier if offer.upstream is given]

    def close(self) -> None:
        """Nobody waits any more: the gateway is shutting down."""
        self._closed = True
        now = monotonic()
        for turn in list(self.queue.upcoming()):
            self.queue.leave(turn)
            self._refuse(turn, "closed", now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everyone who waits, in the order in which they would be served now."""
        now = monotonic()
        for position, turn in enumerate(self.queue.upcoming(), 1):
            yield {
                "position": position,
                "class": PRIORITIES[turn.rank],
                "tenant": turn.tenant,
                "key": turn.of.exchange.key,
                "model": turn.of.exchange.model,
                "request_id": turn.of.exchange.id,
                "waited_s": round(now - turn.queued_at, 3),
                "upstreams": sorted(upstream.name for upstream in turn.of.group.places),
            }

    def _spare(self, places: Collection[Hashable]) -> int:
        """Free places that are not kept for tenants within their share."""
        free = total = 0
        for upstream in cast("Collection[Upstream]", places):
            limit = upstream.limit
            if limit is None:
                return 1
            total += limit
            free += max(0, limit - upstream.in_flight - upstream.held)
        return free - min(self._reserve, int(RESERVE_PART * total))

    # -- inside -------------------------------------------------------------------------------------------------

    def _released(self, upstream: Upstream) -> None:
        """There may be room at `upstream`. One that is ejected gets what the tick finds for it."""
        if upstream.breaker.state == "closed" and not upstream.draining:
            self._hand_over(upstream, self.queue.most)

    def _hand_over(self, upstream: Upstream, most: int) -> None:
        """Give the room there is, up to `most`, to those whose turn it is."""
        while most and upstream.has_room():
            turn = self.queue.next(upstream, monotonic())
            if turn is None:
                break
            self._forget(turn)
            if not turn.of.woken.done():  # else its client left in this turn of the loop
                most -= 1
                upstream.held += 1
                turn.of.woken.set_result(upstream)
        if not self.queue.wanted(upstream):
            upstream.on_room = None

    def _tick(self) -> None:
        self._timer = None
        now = monotonic()
        for turn in self.queue.expired(now):
            self._refuse(turn, "deadline", now)
        for group in list(self._groups.values()):
            self._look(group, now)
        if not len(self.queue):
            return
        self._charge_running()
        soonest_s = (self.queue.next_deadline() or now + TICK_S) - now
        self._timer = asyncio.get_running_loop().call_later(max(0.001, min(TICK_S, soonest_s)), self._tick)

    def _look(self, group: Group, now: float) -> None:
        """Who of the group's tier may be asked now? Its turns wait for those. If they were all replaced, others may."""
        offers = eligible(group.tier, group.tried, now)
        places = frozenset(offer.upstream for offer in offers if not offer.upstream.retired)
        if places != group.places:
            group.places = places
            for turn in list(group.turns):
                self.queue.leave(turn)
                if places:
                    turn.places = places
                    self.queue.put_back(turn, now)
                else:
                    self._forget(turn)
                    if not turn.of.woken.done():
                        turn.of.woken.set_result(None)
        for upstream in places:
            upstream.on_room = self._released
            # No more than a trial for one that is ejected, or is all there is.
            self._hand_over(upstream, self.queue.most if upstream.breaker.state == "closed" else 1)

    def _forget(self, turn: Turn) -> bool:
        """Drop what is kept of a turn; whether it was waiting still."""
        group = turn.of.group
        group.turns.pop(turn, None)
        if not group.turns:
            self._groups.pop((group.tier, group.tried), None)
        return self.queue.leave(turn)

    def _refuse(self, turn: Turn, reason: str, now: float) -> None:
        self._forget(turn)
        waiting: Waiting = turn.of
        if not waiting.woken.done():
            waiting.woken.set_exception(self._refusal(reason, waiting.exchange, waiting.group.tier, now))

    def _refusal(self, reason: str, exchange: Exchange, tier: Sequence[Offer], now: float) -> NoCapacity:
        self.series.shed[reason] = self.series.shed.get(reason, 0) + 1
        if reason == "closed":
            return NoCapacity("the gateway is shutting down", retry_after_s=1.0)
        tenant, weight = self._tenant(exchange.principal)
        wait_s = self.queue.wait_s(tenant, [offer.upstream for offer in tier], exchange.rank, weight, now)
        model = tier[0].model.name
        if reason == "full":
            message = f"every upstream of {model!r} is busy, and too many requests wait already"
        elif self._longest_s:
            message = f"no upstream of {model!r} had room within {self._longest_s:g} s"
        else:
            message = f"every upstream of {model!r} is busy"
        return NoCapacity(message, retry_after_s=min(_NEVER_S, max(1.0, wait_s)))

    def _tenant(self, principal: Principal | None) -> tuple[str, float]:
        if principal is None:
            return "", 1.0
        if principal.group:
            return principal.group, self._weights.get(principal.group, 1.0)
        return principal.key_id, principal.weight

    def _charge(self, exchange: Exchange, upstream: Upstream, cost: float) -> None:
        tenant, weight = self._tenant(exchange.principal)
        self.queue.charge(upstream, exchange.rank, tenant, weight, cost)

    def _charge_running(self) -> None:
        """Charge what running answers have made since the tick before. Seen for the first time, they only begin."""
        charged = self._charged
        for exchange, upstream in self._running.items():
            if not self.queue.wanted(upstream):
                continue
            meter = exchange.meter
            cost = self.queue.cost(_prompt_tokens(exchange), meter.events if meter is not None else 0)
            before = charged.get(exchange)
            if before is None or cost > before:
                charged[exchange] = cost
                if before is not None:
                    self._charge(exchange, upstream, cost - before)


def _prompt_tokens(exchange: Exchange) -> int:
    return exchange.request_bytes // _BYTES_PER_TOKEN + 1
