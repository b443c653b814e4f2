"""dispatch: pick an upstream, lease it, send. While it runs, the client has seen nothing yet.

`async with dispatcher.dispatch(exchange, plan) as reply` gives the upstream's reply; leaving the block in any way
(return, error, cancellation) closes the exchange with the upstream and drops the lease. What fails before the reply
could be given is tried elsewhere, as `gateway.routing.retries` has it: first in the model's own pool, then in that of
its fallbacks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from types import TracebackType
from typing import Any

from gateway.catalog import Offer, Table
from gateway.dispatch.asking import CACHED, CacheSalt, ask_for, cache_salt
from gateway.dispatch.gate import Gate
from gateway.dispatch.hedge import Rival, answered, drop, failure
from gateway.dispatch.plan import Plan, renew
from gateway.dispatch.verdict import exhausted, fault_of, nobody
from gateway.dispatch.wording import patched, request_head
from gateway.errors import GatewayError, NoCapacity, UpstreamError
from gateway.exchange import Attempt, Exchange
from gateway.queueing.fair import FairQueue
from gateway.routing.eligible import eligible, well
from gateway.routing.policies import DEFAULT, POLICIES, Ask, Choice
from gateway.routing.retries import RULES, UNKNOWN, RetryBudget, backoff_s
from gateway.upstreams.reply import Reply
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Lease, Upstream
from gateway.wire.body import Body


class Dispatcher:
    """Sends plans to upstreams: `attempts` at most for each, those after the first as the `budget` allows.

    `admitted` is told of each attempt before the upstream is asked, `changed` when an upstream was ejected or came
    back, `doubted` when one may be gone and should be probed now. `retries` counts the attempts after the first,
    `failures` those that failed, by outcome. `hedge_after_s`: a second upstream is asked as well when the first has
    said nothing for so long; None: never. `table`: what can be asked for now, where that changes.
    """

    def __init__(
        self,
        transport: Transport,
        admitted: Callable[[Exchange], None] | None = None,
        *,
        attempts: int,
        budget: RetryBudget | None = None,
        gate: Gate | None = None,
        changed: Callable[[Upstream], None] | None = None,
        doubted: Callable[[Upstream], None] | None = None,
        policy: str = DEFAULT,
        salted: CacheSalt = "group",
        hedge_after_s: float | None = None,
        table: Callable[[], Table] | None = None,
    ) -> None:
        self._transport = transport
        self.admitted = admitted
        self.attempts = attempts
        self.budget = budget or RetryBudget()
        self.gate = gate or Gate(FairQueue())
        self.changed = changed
        self.doubted = doubted
        self.policy = policy
        self.salted: CacheSalt = salted
        self.hedge_after_s = hedge_after_s
        self.table = table
        self.retries = 0
        self.failures: dict[str, int] = {}

    def dispatch(self, exchange: Exchange, plan: Plan) -> Dispatch:
        self.budget.arrived()
        if plan.operation in CACHED:
            plan.cache_salt = cache_salt(exchange.principal, self.salted)
        return Dispatch(self, self._transport, exchange, plan)

    def succeeded(self, upstream: Upstream, now: float) -> None:
        if upstream.breaker.succeeded(now) and self.changed is not None:
            self.changed(upstream)

    def failed(self, upstream: Upstream, outcome: str, now: float) -> None:
        """Lay a failure at the upstream's door, as far as it is its own."""
        rule = RULES.get(outcome, UNKNOWN)
        self.failures[outcome] = self.failures.get(outcome, 0) + 1
        if not rule.weight:
            upstream.breaker.neutral()
            return
        upstream.failed += 1
        if upstream.breaker.failed(now, rule.weight, gone=rule.gone) and self.changed is not None:
            self.changed(upstream)
        if rule.gone and self.doubted is not None:
            self.doubted(upstream)


class Dispatch:
    """One request's way to an upstream; see the module's docstring."""

    __slots__ = (
        "_able",
        "_ask",
        "_began_at",
        "_dispatcher",
        "_exchange",
        "_lease",
        "_offer",
        "_plan",
        "_reply",
        "_sent_at",
        "_tier",
        "_transport",
        "_tried",
    )

    def __init__(self, dispatcher: Dispatcher, transport: Transport, exchange: Exchange, plan: Plan) -> None:
        self._dispatcher = dispatcher
        self._transport = transport
        self._exchange = exchange
        self._plan = plan
        self._reply: Reply | None = None
        self._lease: Lease | None = None
        self._ask: Ask | None = None
        self._offer = plan.offers[0]
        self._tier = 0
        #: upstreams that failed this request
        self._tried: tuple[Upstream, ...] = ()
        #: which offers can be asked, where not all of the plan's can
        self._able: Callable[[Offer], bool] | None = None
        self._began_at = self._sent_at = 0.0

    def __aenter__(self) -> Coroutine[Any, Any, Reply]:
        self._began_at = monotonic()
        tiers = self._plan.tiers
        ready: Sequence[Offer]
        if len(tiers) == 1 and len(tiers[0]) == 1 and not tiers[0][0].upstream.draining:
            ready = tiers[0]  # nobody else
        else:
            ready = self._ready(self._began_at)
        if not ready:
            raise nobody(self._plan.tiers)
        return self._send(ready, self._plan.body)

    @property
    def offer(self) -> Offer:
        """Who answers, or was asked last."""
        return self._offer

    @property
    def tier(self) -> Sequence[Offer]:
        """The pool that `offer` is of."""
        return self._plan.tiers[self._tier]

    async def another(self, body: bytes, broken: UpstreamError, able: Callable[[Offer], bool] | None = None) -> Reply:
        """One more attempt, elsewhere, for an answer that `broken` ended after the client had seen some of it: `body`
        asks for its rest. `able`: the offers that understand such a request.

        Counts as one of the request's attempts; no part of the retry budget, for it gives no engine work that another
        still has. The same upstream is asked where no other can be and it may be back (`Rule.again`). Raises
        `UpstreamError` if it fails, too, or NoCapacity if nobody is left, or who was asked did not begin a stream.
        """
        self._note(broken.outcome, monotonic())
        self._leave(broken.outcome)
        if self._offer.upstream not in self._tried:
            self._tried = (*self._tried, self._offer.upstream)
        if self._exchange.attempts >= self._dispatcher.attempts:
            raise NoCapacity("no further attempt may be made for this request")
        self._able = able
        ready = self._ready(monotonic())
        if not ready and RULES.get(broken.outcome, UNKNOWN).again == "anywhere":
            self._tried, self._tier = (), 0
            ready = self._ready(monotonic())
        if not ready:
            raise NoCapacity("no upstream can go on with this answer")
        reply = await self._send(ready, Body.parse(body))
        if reply.status == 200 and reply.streaming:
            return reply
        self._leave("")  # it answered: what broke was another
        raise NoCapacity(f"{self._exchange.upstream} answered {reply.status} to being asked for the rest")

    async def _send(self, ready: Sequence[Offer], asked: Body) -> Reply:
        """Attempts, one after the other, until one begins to answer. Raises when no more may be made."""
        exchange = self._exchange
        dispatcher = self._dispatcher
        plan = self._plan
        while True:
            room = ready if exchange.committed else dispatcher.gate.room(ready)  # the rest of an answer cannot wait
            if not room:
                room = await self._room(ready)
            now = self._sent_at = monotonic()
            offer = self._offer = self._choose(room, now)
            upstream = offer.upstream
            if upstream.limit is not None:
                dispatcher.gate.began(exchange, upstream)
            if not upstream.breaker.clear:
                upstream.breaker.chosen(now)
            exchange.attempts += 1
            exchange.model = offer.model.name
            exchange.price = offer.model.price
            exchange.provider = upstream.provider
            exchange.upstream = upstream.name
            try:
                body = patched(plan, offer, asked)
                head = request_head(plan, offer, exchange.id, len(body))
                if dispatcher.admitted is not None and plan.billable:
                    dispatcher.admitted(exchange)
                if dispatcher.hedge_after_s is None or exchange.committed:
                    reply = self._reply = await self._transport.send(upstream, head, body)
                else:
                    reply = self._reply = await self._hedged(asked, head, body)
                    upstream = self._offer.upstream
                if (fault := fault_of(reply, self._offer)) is not None:
                    raise fault
            except UpstreamError as error:
                pause_s = self._next(error)
                if pause_s is None:  # nothing better will come: the upstream's own words
                    assert self._reply is not None
                    reply = self._reply
                else:
                    self._leave("")
                    if pause_s:
                        await asyncio.sleep(pause_s)
                    ready = self._ready(monotonic())
                    if not ready:
                        raise exhausted(error, exchange.attempts_made, self._plan.tiers) from error
                    dispatcher.retries += 1
                    continue
            except BaseException:
                self._leave("client_gone")
                raise
            else:
                dispatcher.succeeded(upstream, reply.first_byte_at)
                if exchange.attempts_made:
                    self._note("ok", reply.first_byte_at)
            exchange.first_byte_at = reply.first_byte_at
            if reply.streaming:
                assert self._lease is not None
                self._lease.began(reply.first_byte_at)
            if not exchange.committed:
                exchange.headers += upstream.told
                if exchange.model != exchange.model_asked:
                    exchange.headers += b"x-gateway-model: %b\r\n" % exchange.model.encode("ascii", "backslashreplace")
                if exchange.route_reason:
                    exchange.headers += b"x-gateway-route-reason: %b\r\n" % exchange.route_reason.encode()
            return reply

    async def _hedged(self, asked: Body, head: bytes, body: bytes) -> Reply:
        """As `Transport.send`, and of a second upstream as well if the first says nothing for `hedge_after_s`, under
        the retry budget. Who begins to answer first answers; the other is closed at once, and what it did is not
        billed: a runtime reports usage at an answer's end.
        """
        first = asyncio.create_task(self._transport.send(self._offer.upstream, head, body), name="attempt")
        rival: Rival | None = None
        kept: asyncio.Task[Reply] | None = None
        try:
            await asyncio.wait((first,), timeout=self._dispatcher.hedge_after_s)
            if not first.done():
                rival = self._rival(asked)
            if rival is not None:
                await asyncio.wait((first, rival.task), return_when=asyncio.FIRST_COMPLETED)
                if not answered(first, self._offer):
                    if first.done():  # and failed: all hope is on the other
                        await asyncio.wait((rival.task,))
                    if answered(rival.task, rival.offer):
                        self._overtaken(first, rival)
                        kept = rival.task
                        return kept.result()
                self._lost(rival)
                rival = None
            await asyncio.wait((first,))
            kept = first
            return kept.result()
        finally:
            if kept is not first:
                drop(first)
            if rival is not None and kept is not rival.task:
                self._dispatcher.failed(rival.offer.upstream, "client_gone", monotonic())
                rival.drop(monotonic())

    def _rival(self, asked: Body) -> Rival | None:
        """A second attempt, begun; None if none may be made, or nobody else has room."""
        exchange = self._exchange
        now = monotonic()
        mine = self._offer.upstream
        tier = self._tier
        others = [offer for offer in self._among_tiers(now) if offer.upstream is not mine]
        others = list(self._dispatcher.gate.room(others)) if others else []
        if not others or exchange.attempts >= self._dispatcher.attempts or not self._dispatcher.budget.take(now):
            self._tier = tier
            return None
        kept = self._lease, exchange.route_reason, exchange.ttft_predicted_s, exchange.believed_cached
        offer = self._choose(others, now)
        lease = self._lease
        its_tier, self._tier = self._tier, tier
        self._lease, exchange.route_reason, exchange.ttft_predicted_s, exchange.believed_cached = kept
        assert lease is not None
        strips = self._plan.strip_usage
        try:
            body = patched(self._plan, offer, asked)
            head = request_head(self._plan, offer, exchange.id, len(body))
        except GatewayError:  # it has no such route: that is no fault of the first
            lease.release(now)
            return None
        finally:
            strip_usage, self._plan.strip_usage = self._plan.strip_usage, strips
        if not offer.upstream.breaker.clear:
            offer.upstream.breaker.chosen(now)
        exchange.attempts += 1
        self._dispatcher.retries += 1
        task = asyncio.create_task(self._transport.send(offer.upstream, head, body), name="hedged attempt")
        return Rival(offer, lease, task, now, strip_usage, its_tier)

    def _lost(self, rival: Rival) -> None:
        """The first answers, or `rival` has failed: what it held is given back now, not when the first has ended."""
        now = monotonic()
        fault = failure(rival.task, rival.offer)
        outcome = "outrun" if fault is None else fault.outcome
        self._dispatcher.failed(rival.offer.upstream, outcome, now)
        self._made(rival.attempt(outcome, now))
        if fault is not None:
            self._tried = (*self._tried, rival.offer.upstream)
        rival.drop(now)

    def _overtaken(self, first: asyncio.Task[Reply], rival: Rival) -> None:
        """`rival` answers in place of the first."""
        exchange = self._exchange
        now = monotonic()
        fault = failure(first, self._offer)
        outcome = "outrun" if fault is None else fault.outcome
        self._dispatcher.failed(self._offer.upstream, outcome, now)
        self._note(outcome, now)
        if self._lease is not None:
            self._lease.release(now)
        offer = self._offer = rival.offer
        self._lease = rival.lease
        self._sent_at = rival.sent_at
        self._tier = rival.tier
        self._plan.strip_usage = rival.strip_usage
        if offer.upstream.limit is not None:
            self._dispatcher.gate.began(exchange, offer.upstream)
        exchange.model = offer.model.name
        exchange.price = offer.model.price
        exchange.provider = offer.upstream.provider
        exchange.upstream = offer.upstream.name
        exchange.route_reason = "hedge"
        if self._dispatcher.admitted is not None and self._plan.billable:
            self._dispatcher.admitted(exchange)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self._exchange.error
        self._leave(failure.outcome if isinstance(failure, UpstreamError) else "client_gone" if error else "")

    # -- whom to ask ------------------------------------------------------------------------------------------------

    def _ready(self, now: float) -> Sequence[Offer]:
        """The offers to choose from; of hosts that are served no more only if no other is."""
        ready = self._among_tiers(now)
        if not ready or ready[0].upstream.retired:  # all of them: they count as gone, and are the last to be asked
            table = self._dispatcher.table
            if table is not None and renew(self._exchange, self._plan, table()):
                self._tier = 0
                ready = self._among_tiers(now)
        return ready

    def _among_tiers(self, now: float) -> Sequence[Offer]:
        """Of the first tier where one is thought well, else of the first that has any."""
        last = len(self._plan.tiers) - 1
        ready = self._of(self._tier, now)
        if self._tier == last or (ready and well(ready, now)):
            return ready
        first, found = self._tier, ready
        for at in range(self._tier + 1, last + 1):
            ready = self._of(at, now)
            if ready and well(ready, now):
                self._tier = at
                return ready
            if ready and not found:
                first, found = at, ready
        self._tier = first if found else last
        return found

    def _of(self, at: int, now: float) -> Sequence[Offer]:
        """Those of one tier that may be asked."""
        tier = self._plan.tiers[at]
        if self._able is not None:
            tier = tuple(filter(self._able, tier))
        return eligible(tier, self._tried, now)

    async def _room(self, ready: Sequence[Offer]) -> Sequence[Offer]:
        """Wait until one of those that may be asked has room for this request. Raises NoCapacity."""
        gate = self._dispatcher.gate
        while not (room := gate.room(ready)):
            room = await gate.wait(self._exchange, self._plan.tiers[self._tier], self._tried, ready)
            if room:
                break
            ready = self._ready(monotonic())
            if not ready:
                raise nobody(self._plan.tiers)
        return room

    def _choose(self, ready: Sequence[Offer], now: float) -> Offer:
        """One of `ready`, which is not empty; its load is counted here and now, before the next request's choice."""
        exchange = self._exchange
        streamed = exchange.stream
        if len(self._plan.tiers[self._tier]) == 1:  # nothing to choose, now or later: the prompt is not looked at
            offer = ready[0]
            exchange.route_reason = "only"
            self._lease = offer.upstream.lease(0, now, offer.model.name, streamed=streamed)
            return offer
        ask = self._ask
        if ask is None or ask.model != ready[0].model.name:
            ask = self._ask = ask_for(self._plan, ready[0], now)
        ask.now = now
        choose = POLICIES[ready[0].model.policy or self._dispatcher.policy]
        choice: Choice[Offer] = choose(ready, ask)
        exchange.route_reason = "only" if len(ready) == 1 else choice.reason
        exchange.ttft_predicted_s = choice.ttft_s
        exchange.believed_cached = choice.cached if ask.hashed is not None else None
        offer = choice.candidate
        self._lease = offer.upstream.lease(
            choice.uncached, now, ask.model, ask.hashed, loads=choice.loads, streamed=streamed
        )
        return offer

    # -- what became of it ------------------------------------------------------------------------------------------

    def _next(self, error: UpstreamError) -> float | None:
        """Whether to go on after `error`: the seconds to wait first; None to give the client what the upstream said.

        Raises the error that the client gets, if that is the end.
        """
        exchange = self._exchange
        upstream = self._offer.upstream
        outcome = error.outcome
        rule = RULES.get(outcome, UNKNOWN)
        now = monotonic()
        self._dispatcher.failed(upstream, outcome, now)
        pause_s = 0.0
        again = rule.again != "never" and exchange.attempts < self._dispatcher.attempts
        if again:
            if upstream not in self._tried:
                self._tried = (*self._tried, upstream)
            if not self._ready(now):
                again = rule.again == "anywhere"
                self._tried, self._tier = (), 0
                pause_s = backoff_s(exchange.attempts, random.random())  # noqa: S311
        if again and ((rule.gone and upstream.breaker.took(self._sent_at)) or self._dispatcher.budget.take(now)):
            self._note(outcome, now)
            return pause_s
        if not exchange.attempts_made and self._reply is not None and (self._reply.status >= 500 or outcome == "busy"):
            return None
        if exchange.attempts_made:
            self._note(outcome, now)
        self._leave("")
        raise exhausted(error, exchange.attempts_made, self._plan.tiers) from error

    def _note(self, outcome: str, now: float) -> None:
        """Write the attempt down."""
        status = self._reply.status if self._reply is not None else 0
        self._made(Attempt(self._offer.upstream.name, outcome, round(now - self._sent_at, 6), status))

    def _made(self, attempt: Attempt) -> None:
        made = self._exchange.attempts_made
        if isinstance(made, list):
            made.append(attempt)
        else:
            self._exchange.attempts_made = [attempt]

    def _leave(self, outcome: str) -> None:
        """Close the exchange with the upstream (a no-op for one that is complete) and drop the lease. `outcome`: what
        is still to be said about the upstream, if anything.
        """
        now = monotonic()
        self._exchange.upstream_s = now - self._began_at - self._exchange.queued_s
        if self._reply is not None:
            self._reply.close()
            self._reply = None
        lease, self._lease = self._lease, None
        if lease is not None:
            usage = self._exchange.usage
            if usage is None and self._exchange.meter is not None:
                usage = self._exchange.meter.usage
            if usage is not None and not usage.estimated:
                lease.cached(usage.cached, usage.prompt)
            if outcome and lease.upstream is not None:
                self._dispatcher.failed(lease.upstream, outcome, now)
            lease.release(now)
