"""dispatch: pick an upstream, lease it, send. While it runs, the client has seen nothing yet.

`async with dispatcher.dispatch(exchange, plan) as reply` gives the upstream's reply; leaving the block in any way
(return, error, cancellation) closes the exchange with the upstream and drops the lease.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Final

import orjson

from gateway import __version__
from gateway.catalog import Offer
from gateway.errors import BadRequest, UpstreamError, UpstreamUnreachable
from gateway.exchange import Exchange
from gateway.handlers.resolve import Plan
from gateway.upstreams.policies import least_in_flight
from gateway.upstreams.reply import Reply
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Lease
from gateway.wire.body import usage_options

_USER_AGENT: Final = b"local-llm-gateway/" + __version__.encode()


class Dispatcher:
    """Sends plans to upstreams. `retries` counts the attempts after the first. `admitted` is told of each attempt
    before the upstream is asked.
    """

    def __init__(self, transport: Transport, admitted: Callable[[Exchange], None] | None = None) -> None:
        self._transport = transport
        self.admitted = admitted
        self.retries = 0

    def dispatch(self, exchange: Exchange, plan: Plan) -> Dispatch:
        return Dispatch(self, self._transport, exchange, plan)


class Dispatch:
    """One request's way to an upstream; see the module's docstring."""

    __slots__ = ("_dispatcher", "_exchange", "_lease", "_plan", "_reply", "_sent_at", "_transport")

    def __init__(self, dispatcher: Dispatcher, transport: Transport, exchange: Exchange, plan: Plan) -> None:
        self._dispatcher = dispatcher
        self._transport = transport
        self._exchange = exchange
        self._plan = plan
        self._reply: Reply | None = None
        self._lease: Lease | None = None
        self._sent_at = 0.0

    async def __aenter__(self) -> Reply:
        exchange = self._exchange
        candidates = self._plan.offers
        self._sent_at = monotonic()
        while True:
            offer = candidates[0] if len(candidates) == 1 else least_in_flight(candidates)
            upstream = offer.upstream
            exchange.attempts += 1
            exchange.model = offer.model.name
            exchange.price = offer.model.price
            exchange.provider = upstream.provider
            exchange.upstream = upstream.name
            body = patched(self._plan, offer)
            head = request_head(self._plan, offer, exchange.id, len(body))
            self._lease = upstream.lease()
            if self._dispatcher.admitted is not None:
                self._dispatcher.admitted(exchange)
            try:
                reply = self._reply = await self._transport.send(upstream, head, body)
                if reply.status in (401, 403):
                    # The upstream's word about our credential, which the client would take for one about its own.
                    raise UpstreamError(
                        f"provider {upstream.provider!r} refused the gateway's credential ({reply.status}): "
                        "check its `apiKey`",
                        code="upstream_auth_failed",
                    )
                if 300 <= reply.status < 400:  # followed blindly, it would take prompts to another host
                    raise UpstreamError(
                        f"provider {upstream.provider!r} redirects ({reply.status}): "
                        "set its `baseUrl` to the final address",
                        code="upstream_redirect",
                    )
            except UpstreamUnreachable:
                self._leave(upstream_failed=True)
                candidates = tuple(one for one in candidates if one.upstream is not upstream)
                if not candidates:
                    raise
                self._dispatcher.retries += 1
                continue
            except UpstreamError:
                self._leave(upstream_failed=True)
                raise
            except BaseException:
                self._leave(upstream_failed=False)
                raise
            exchange.first_byte_at = reply.first_byte_at
            return reply

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(upstream_failed=isinstance(self._exchange.error, UpstreamError))

    def _leave(self, *, upstream_failed: bool) -> None:
        """Close the exchange with the upstream (a no-op for one that is complete) and drop the lease."""
        self._exchange.upstream_s = monotonic() - self._sent_at
        if self._reply is not None:
            self._reply.close()
            self._reply = None
        lease, self._lease = self._lease, None
        if lease is not None:
            if upstream_failed and lease.upstream is not None:
                lease.upstream.failed += 1
            lease.release()


def patched(plan: Plan, offer: Offer) -> bytes:
    """The body for this offer: the client's bytes, spliced only where they must differ."""
    body = plan.body
    replace = plan.replace
    remove = plan.remove
    model = offer.model
    if not (replace or remove or body.stream) and body.model == model.name:
        plan.strip_usage = False
        return body.raw
    if body.model != model.name:
        replace = {**replace, "model": orjson.dumps(model.name)}
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
