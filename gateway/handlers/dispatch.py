"""dispatch: pick an upstream, lease it, send. While it runs, the client has seen nothing yet.

`async with dispatcher.dispatch(exchange, plan) as reply` gives the upstream's reply; leaving the block in any way
(return, error, cancellation) closes the exchange with the upstream and drops the lease. What fails before the reply
could be given is tried elsewhere, as `gateway.routing.retries` has it: first in the model's own pool, then in that of
its fallbacks.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Final

import orjson

from gateway import __version__
from gateway.catalog import Offer
from gateway.errors import BadRequest, NoCapacity, UpstreamBroken, UpstreamError, UpstreamTimeout
from gateway.exchange import Attempt, Exchange
from gateway.handlers.asking import CACHED, CacheSalt, ask_for, cache_salt
from gateway.handlers.gate import Gate
from gateway.handlers.resolve import Plan
from gateway.routing.eligible import eligible, quiet_for_s, well
from gateway.routing.fair import FairQueue
from gateway.routing.policies import DEFAULT, POLICIES, Ask, Choice
from gateway.routing.retries import RULES, UNKNOWN, RetryBudget, backoff_s, retry_after_s
from gateway.upstreams.reply import Reply
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Lease, Upstream
from gateway.wire.body import Body, usage_options
from gateway.wire.opening import fault

_USER_AGENT: Final = b"local-llm-gateway/" + __version__.encode()


class Dispatcher:
    """Sends plans to upstreams: `attempts` at most for each, those after the first as the `budget` allows.

    `admitted` is told of each attempt before the upstream is asked, `changed` when an upstream was ejected or came
    back, `doubted` when one may be gone and should be probed now. `retries` counts the attempts after the first,
    `failures` those that failed, by outcome.
    """

    def __init__(
        self,
        transport: Transport,
        admitted: Callable[[Exchange], None] | None = None,
        *,
        attempts: int = 3,
        budget: RetryBudget | None = None,
        gate: Gate | None = None,
        changed: Callable[[Upstream], None] | None = None,
        doubted: Callable[[Upstream], None] | None = None,
        policy: str = DEFAULT,
        salted: CacheSalt = "group",
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
        ready = self._ready(self._began_at)
        if not ready:
            raise self._nobody()
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
        still has. The same upstream may be asked where no other can be. Raises `UpstreamError` if it fails, too, or
        NoCapacity if nobody is left.
        """
        self._note(broken.outcome, monotonic())
        self._leave(broken.outcome)
        if self._offer.upstream not in self._tried:
            self._tried = (*self._tried, self._offer.upstream)
        if self._exchange.attempts >= self._dispatcher.attempts:
            raise NoCapacity("no further attempt may be made for this request")
        self._able = able
        ready = self._ready(monotonic())
        if not ready:  # it may be back: an engine's process is started again, or one of several behind an address died
            self._tried, self._tier = (), 0
            ready = self._ready(monotonic())
        if not ready:
            raise NoCapacity("no upstream can go on with this answer")
        return await self._send(ready, Body.parse(body))

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
                if dispatcher.admitted is not None:
                    dispatcher.admitted(exchange)
                reply = self._reply = await self._transport.send(upstream, head, body)
                if reply.status >= 300:
                    self._judge(reply, offer)
                elif reply.streaming and reply.status == 200:
                    self._listen(reply, upstream)
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
                        raise self._exhausted(error) from error
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

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self._exchange.error
        self._leave(failure.outcome if isinstance(failure, UpstreamError) else "client_gone" if error else "")

    # -- whom to ask ------------------------------------------------------------------------------------------------

    def _ready(self, now: float) -> Sequence[Offer]:
        """The offers to choose from: of the first tier where one is thought well, else of the first that has any."""
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
                raise self._nobody()
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

    def _judge(self, reply: Reply, offer: Offer) -> None:
        """Raises for an answer that says nothing about the request, but about the upstream: another may do better."""
        status = reply.status
        upstream = offer.upstream
        if status >= 500 or status == 429:
            if status in (501, 505):
                return
            wait_s = retry_after_s(reply.head.header(b"retry-after"), time.time()) if status in (429, 503) else None
            if wait_s:
                offer.quiet_until = monotonic() + wait_s
            code = "busy" if status == 429 or wait_s is not None else "unavailable" if status == 503 else "failed"
            raise UpstreamError(
                f"provider {upstream.provider!r} answered {status}", code=f"upstream_{code}", retry_after_s=wait_s
            )
        if status in (401, 403):
            # The upstream's word about our credential, which the client would take for one about its own.
            raise UpstreamError(
                f"provider {upstream.provider!r} refused the gateway's credential ({status}): check its `apiKey`",
                code="upstream_auth_failed",
            )
        if status < 400:  # followed blindly, it would take prompts to another host
            raise UpstreamError(
                f"provider {upstream.provider!r} redirects ({status}): set its `baseUrl` to the final address",
                code="upstream_redirect",
            )

    def _listen(self, reply: Reply, upstream: Upstream) -> None:
        """Raises for a stream that ended, or reported an error, before it had any content."""
        said = reply.opening
        if said is None:
            if reply.complete and reply.body():
                raise UpstreamBroken(
                    f"provider {upstream.provider!r} ended its stream before the answer was finished",
                    code="upstream_incomplete",
                )
        elif (text := fault(said)) is not None:
            raise UpstreamError(
                f"provider {upstream.provider!r} failed before it began to answer: {text}",
                code="upstream_stream_error",
            )

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
        raise self._exhausted(error) from error

    def _note(self, outcome: str, now: float) -> None:
        """Write the attempt down."""
        made = self._exchange.attempts_made
        status = self._reply.status if self._reply is not None else 0
        attempt = Attempt(self._offer.upstream.name, outcome, round(now - self._sent_at, 6), status)
        if isinstance(made, list):
            made.append(attempt)
        else:
            self._exchange.attempts_made = [attempt]

    def _exhausted(self, error: UpstreamError) -> Exception:
        """What the client is told when all attempts failed: the only one's own error, or one that lists them all."""
        made = self._exchange.attempts_made
        if len(made) < 2:
            return error
        tried = "; ".join(f"{one.upstream}: {one.outcome.replace('_', ' ')} after {one.seconds:.1f} s" for one in made)
        message = f"{error.message} (attempts: {tried})"
        outcomes = {one.outcome for one in made}
        if outcomes & {"busy", "unavailable"}:
            wait_s = max(1.0, error.retry_after_s or quiet_for_s(self._plan.tiers, monotonic()))
            return NoCapacity(message, retry_after_s=wait_s)
        if all(outcome.endswith("timeout") for outcome in outcomes):
            return UpstreamTimeout(message, code=error.code)
        return UpstreamError(message, status=error.status, code=error.code)

    def _nobody(self) -> NoCapacity:
        """Why nobody can be asked at all."""
        wait_s = quiet_for_s(self._plan.tiers, monotonic())
        if wait_s:
            return NoCapacity("every upstream of this model asked to be left alone for now", retry_after_s=wait_s)
        return NoCapacity("every upstream of this model is being taken out of service", retry_after_s=5.0)

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


def patched(plan: Plan, offer: Offer, body: Body) -> bytes:
    """`body` for this offer: the client's bytes, spliced only where they must differ."""
    replace = plan.replace
    remove = plan.remove
    model = offer.model
    salted = plan.cache_salt and offer.upstream.runtime.cache_salt
    if not (replace or remove or body.stream or salted) and body.model == model.name:
        plan.strip_usage = False
        return body.raw
    if body.model != model.name:
        replace = {**replace, "model": orjson.dumps(model.name)}
    if salted:  # the client's own is replaced
        replace = {**replace, "cache_salt": b'"%b"' % plan.cache_salt.encode()}
    plan.strip_usage = False
    native = plan.native and plan.native in offer.upstream.runtime.paths
    streamed = replace.get("stream", b"true" if body.stream else b"false") == b"true"
    if streamed and not native and not body.include_usage and offer.upstream.runtime.inject_usage:
        plan.strip_usage = True
        replace = {**replace, "stream_options": usage_options(body)}
    if not replace and not remove:
        return body.raw
    return body.patch(replace, remove)


def request_head(plan: Plan, offer: Offer, request_id: str, length: int) -> bytes:
    """The request's head up to and with its empty line."""
    operation = plan.operation
    runtime = offer.upstream.runtime
    if plan.native and plan.native in runtime.paths:
        operation = plan.native
    head = offer.heads.get(operation)
    if head is None:
        head = offer.heads[operation] = _fixed_head(offer, operation)
    extra = b"".join([b"%b: %b\r\n" % pair for pair in plan.headers]) if plan.headers else b""
    return b"%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (head, extra, request_id.encode(), length)


def _fixed_head(offer: Offer, operation: str) -> bytes:
    upstream = offer.upstream
    target = upstream.runtime.target(upstream.prefix, operation)
    if target is None:
        raise BadRequest(
            f"{upstream.runtime.title} ({upstream.provider!r}) has no route for this request",
            status=404,
            code="operation_not_supported",
        )
    lines = [
        f"POST {target} HTTP/1.1".encode(),
        b"Host: " + upstream.netloc.encode("idna" if not upstream.netloc.isascii() else "ascii"),
        b"User-Agent: " + _USER_AGENT,
        b"Content-Type: application/json",
        b"Accept-Encoding: identity",
    ]
    if upstream.api_key:  # set by us, last word: the client's own credential never passes
        lines.append(b"Authorization: Bearer " + upstream.api_key.encode())
    return b"\r\n".join(lines) + b"\r\n"
