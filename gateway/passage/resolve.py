"""resolve: read and understand a request, and decide what may be asked of whom. Decides without awaiting."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web
from aiohttp.http import HttpVersion11

from gateway.catalog import Table, Tiers, nearest
from gateway.dispatch.asking import SESSION_HEADER
from gateway.dispatch.plan import Plan, allowed, kept
from gateway.errors import BadRequest, BodyTooLarge, Forbidden, ModelNotFound, NoCapacity, NotFound, RequestTimeout
from gateway.exchange import Exchange
from gateway.runtimes.runtime import OPENAI_PATHS, Runtime
from gateway.wire.body import Body
from gateway.wire.headers import request_headers

if TYPE_CHECKING:
    from gateway.identity.principals import Principal
    from gateway.passage.proxy import Surface
    from gateway.server import ClientProtocol

TOOL_FIELDS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"})
TOOLS_REMOVED: Final = b"X-Gateway-Tools: removed\r\n"
#: the class in which a request waits for room, if that is lower than its key's
PRIORITY: Final = "X-Gateway-Priority"
#: A body's rate is judged only after this time, so that a slow start is no offence.
RATE_GRACE_S: Final = 5.0
#: when to ask again for a model whose host names resolve to nothing
HOSTLESS_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """`max_bytes` a body may have, `timeout_s` it may take, `min_rate` bytes per second it must keep up."""

    max_bytes: int
    timeout_s: float
    min_rate: int


def read_now(request: web.BaseRequest, limits: BodyLimits) -> bytes | None:
    """The body if it came along with the head, as small ones do; None if it must be waited for.

    Raises BodyTooLarge by the declared length, before anything is read.
    """
    body = cast("ClientProtocol", request.protocol).whole_body(request.content)
    if body is not None:
        if len(body) > limits.max_bytes:
            raise _too_large(limits)
        return body
    length = request.content_length
    if length is not None and length > limits.max_bytes:
        raise _too_large(limits)
    return None


async def read_body(request: web.BaseRequest, limits: BodyLimits) -> bytes:
    """The body of a request that is still being sent: 413 if it grows too large, 408 if it comes too slowly."""
    payload = request.content
    expect = request.headers.get("Expect")
    if expect is not None and request.version >= HttpVersion11:
        if expect.lower() != "100-continue":
            raise BadRequest("the only expectation met here is `100-continue`", status=417)
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces = []
    size = 0
    began_at = monotonic()
    try:
        async with asyncio.timeout(limits.timeout_s):
            while not payload.at_eof():
                async with asyncio.timeout(RATE_GRACE_S if limits.min_rate else None):
                    piece = await payload.readany()
                pieces.append(piece)
                size += len(piece)
                if size > limits.max_bytes:
                    raise _too_large(limits)
                spent_s = monotonic() - began_at
                if spent_s > RATE_GRACE_S and size < limits.min_rate * spent_s:
                    raise TimeoutError
    except TimeoutError:
        if cast("ClientProtocol", request.protocol).spoilt():
            raise BadRequest("the request body is not framed as HTTP wants it", code="malformed_http") from None
        raise RequestTimeout(
            f"the request body came too slowly: it must arrive within {limits.timeout_s:g} s and at "
            f"{limits.min_rate} bytes per second or more"
        ) from None
    return b"".join(pieces)


def _too_large(limits: BodyLimits) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than the {limits.max_bytes} bytes allowed here")


def resolve(
    exchange: Exchange,
    request: web.BaseRequest,
    raw: bytes,
    surface: Surface,
    table: Table,
    *,
    reject_tools: bool,
) -> Plan:
    """Understand the body and choose the offers it may go to. Raises the error that names what is wrong."""
    body = exchange.body = Body.parse(raw)
    provider = _provider(body, surface, table)
    pools = table.pools if provider is None else table.by_provider[provider]
    name = body.model
    if not name:
        raise BadRequest(
            f"`model` is missing: name the model to ask. {_offered(table, provider, exchange.principal)}",
            param="model",
        )
    if not body.present(surface.needs):
        raise BadRequest(
            f"`{surface.needs}` is missing from the request for {name[:200]!r}. "
            f"{_offered(table, provider, exchange.principal)}",
            param=surface.needs,
        )
    if surface.never and body.present(surface.never) and body.get(surface.never) is not False:
        raise BadRequest(f"`{surface.never}` is not supported here", param=surface.never, code="unsupported_parameter")
    exchange.model_asked = name
    tiers = pools.tiers.get(name)
    if tiers is None:
        raise _unknown(name, provider, table, exchange.principal)
    principal = exchange.principal
    may_use = None if principal is None or principal.models is None else principal.may_use
    if may_use is not None and not any(may_use(model.name) for model in pools.models[name]):
        raise Forbidden(f"this key may not use {name!r}", param="model", code="model_not_allowed")
    tiers = allowed(tiers, principal)
    if not tiers:
        raise NoCapacity(f"no host that serves {name!r} is known now", param="model", retry_after_s=HOSTLESS_S)
    if surface.operation not in OPENAI_PATHS:  # not every runtime has it
        tiers = _having(tiers, surface.operation, exchange.path, name)
    plan = Plan(body, tiers, surface.operation, surface.native)
    plan.billable = surface.billable
    plan.provider = provider
    plan.headers = request_headers(request.raw_headers)
    if principal is not None:
        exchange.rank = principal.rank(request.headers.get(PRIORITY))
    if len(tiers[0]) > 1:
        plan.session = request.headers.get(SESSION_HEADER, "")
    if surface.local and body.has("provider"):
        plan.remove = ("provider",)
    if not TOOL_FIELDS.isdisjoint(body.keys()):
        _choose_for_tools(exchange, plan, name, reject_tools)
    stream = surface.stream
    if stream is None:
        streams = surface.streams
        exchange.stream = streams is not None and (streams if body.stream is None else body.stream)
    else:
        exchange.stream = stream
        if body.stream is not stream:
            plan.replace["stream"] = b"true" if stream else b"false"
        if not stream and body.has("stream_options"):
            plan.remove = (*plan.remove, "stream_options")  # refused by vLLM where nothing is streamed
    return plan


def _having(tiers: Tiers, operation: str, path: str, name: str) -> Tiers:
    """Leave the offers whose runtime has the operation; NotFound, with what they do have, where none has."""
    left = kept(tiers, lambda offer: operation in offer.upstream.runtime.paths)
    if not left:
        runtimes: dict[str, Runtime] = {offer.upstream.runtime.title: offer.upstream.runtime for offer in tiers[0]}
        has = "; ".join(f"{title} has {', '.join(one.paths.values())}" for title, one in runtimes.items())
        raise NotFound(f"what serves {name!r} has no {path}: {has}", param="model", code="operation_not_supported")
    return left


def _choose_for_tools(exchange: Exchange, plan: Plan, name: str, reject: bool) -> None:
    """Leave the offers that support tools. Where the model itself has none, refuse, or take the tools out and say so:
    then for every offer, for the client is told before it is known who answers.
    """
    able = kept(plan.tiers, lambda offer: offer.model.supports_tools)
    if any(offer.model.supports_tools for offer in plan.offers):
        plan.tiers = able
        plan.tools = True
    elif reject:
        raise BadRequest(
            f"{name!r} does not support tools (`supportsTools` is false): send the request without `tools`",
            param="tools",
            code="tools_not_supported",
        )
    else:
        exchange.headers += TOOLS_REMOVED
        plan.remove = (*plan.remove, *(field for field in TOOL_FIELDS if plan.body.has(field)))


def _provider(body: Body, surface: Surface, table: Table) -> str | None:
    if not surface.local or not body.has("provider"):
        return None
    name = body.get("provider")
    if name is None:
        return None
    if not isinstance(name, str):
        raise BadRequest("`provider` must be a string", param="provider")
    if name not in table.by_provider:
        known = ", ".join(repr(one) for one in sorted(table.by_provider)) or "none is configured"
        raise NotFound(
            f"there is no provider {name[:200]!r}; known: {known}", param="provider", code="provider_not_found"
        )
    return name


def _names(table: Table, provider: str | None, principal: Principal | None) -> list[str]:
    """The names this caller may ask for, sorted: what a key may not use it does not learn of."""
    pools = table.by_provider[provider] if provider else table.pools
    if principal is None or principal.models is None:
        return sorted(pools)
    return sorted(
        name for name, models in pools.models.items() if any(principal.may_use(model.name) for model in models)
    )


def _offered(table: Table, provider: str | None, principal: Principal | None) -> str:
    names = _names(table, provider, principal)
    where = f"Provider {provider!r}" if provider else "This gateway"
    if not names:
        hints = [one.hint for one in table.providers if one.hint and provider in (None, one.name)]
        return f"{where} offers no models: {'; '.join(hints) or 'no provider is configured (OPENAI_COMPATIBLE_DATA)'}"
    shown = names[:20]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{where} offers: {', '.join(shown)}{more}"


def _unknown(name: str, provider: str | None, table: Table, principal: Principal | None) -> ModelNotFound:
    near = nearest(name, _names(table, provider, principal))
    if near:
        tail = f"; did you mean {' or '.join(repr(one) for one in near)}?"
    else:
        tail = f". {_offered(table, provider, principal)}"
    where = f" at provider {provider!r}" if provider else ""
    return ModelNotFound(f"the model {name[:200]!r} does not exist{where}{tail}", param="model")
