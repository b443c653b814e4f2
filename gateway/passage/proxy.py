"""Proxy: the handler of every route that reaches a model."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.catalog import Catalog
from gateway.dispatch.dispatcher import Dispatcher
from gateway.errors import Family
from gateway.passage.admission import admit
from gateway.passage.continuation import Continuations
from gateway.passage.relay import relay, relay_whole
from gateway.passage.resolve import BodyLimits, read_body, read_now, resolve
from gateway.passage.waiting import Comments, unfit

if TYPE_CHECKING:
    from gateway.limits.limiter import Limiter


@dataclass(frozen=True, slots=True)
class Surface:
    """One way in: how its requests are read, and what an upstream is asked for them.

    `operation` names the path in a runtime's allow-list, `native` one that is preferred where the runtime has it
    (Ollama's own chat). `needs` is the field a request cannot do without, `never` one that must not be true. `stream`
    forces the answer's form; None leaves it to the client, and `streams` is what it is where the client says nothing;
    None: there are no streams. `local`: the body may name a `provider`, which no upstream sees. `billable`: tokens are
    used, so the limits of tokens hold and the ledger has a record.
    """

    operation: str
    name: str  # gen_ai operation name, for metrics
    needs: str
    family: Family = "openai"
    native: str = ""
    stream: bool | None = None
    local: bool = False
    streams: bool | None = False
    never: str = ""
    billable: bool = True


class Proxy:
    """resolve, admit, dispatch, relay."""

    def __init__(
        self,
        surface: Surface,
        catalog: Catalog,
        dispatcher: Dispatcher,
        limits: BodyLimits,
        limiter: Limiter,
        continuations: Continuations,
        *,
        comments: Comments | None = None,
        reject_tools: bool = False,
    ) -> None:
        self._surface = surface
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._limits = limits
        self._limiter = limiter
        self._continuations = continuations
        self._comments = comments or Comments(0)
        self._reject_tools = reject_tools

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        surface = self._surface
        exchange.family = surface.family
        exchange.operation = surface.name
        raw = read_now(request, self._limits)
        if raw is None:
            began_at = monotonic()
            raw = await read_body(request, self._limits)
            exchange.waited_s = monotonic() - began_at
        exchange.request_bytes = len(raw)
        plan = resolve(exchange, request, raw, surface, self._catalog.table, reject_tools=self._reject_tools)
        waiting = admit(self._limiter, exchange, plan) if surface.billable else None
        if waiting is not None:
            await waiting
        dispatch = self._dispatcher.dispatch(exchange, plan)
        commented = self._comments.begin(request, exchange, plan)
        try:
            async with dispatch as reply:
                if commented:
                    self._comments.end(exchange)
                    if exchange.head_sent and (error := unfit(exchange, reply)) is not None:
                        raise error
                if reply.complete and not exchange.head_sent:
                    response = relay_whole(request, exchange, reply, plan.strip_usage)
                    if response is not None:
                        return response
                kept = self._continuations.begin(exchange, plan, dispatch, reply) if exchange.stream else None
                return await relay(request, exchange, reply, plan.strip_usage, kept)
        finally:
            if commented:
                self._comments.end(exchange)
            if not surface.billable:
                exchange.meter = exchange.usage = None
