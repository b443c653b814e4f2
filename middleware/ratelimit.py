"""The limits of requests that are for no model. Those for one take all of theirs at once, in the handler, when the
model and the size are known (`gateway.passage.admission`); so every request takes once, and a refused one nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Container

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.limits.limiter import Limiter
from middleware import Answer, Handler


class RateLimit:
    """`elsewhere`: paths whose handler takes the limits itself, or that are not limited."""

    def __init__(self, limiter: Limiter, elsewhere: Container[str]) -> None:
        self._limiter = limiter
        self._elsewhere = elsewhere

    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        exchange = request[EXCHANGE]
        if exchange.path in self._elsewhere or exchange.path.startswith("/admin/"):  # who sets limits is not shut out
            return handler(request)
        entry = self._limiter.entry(exchange, "")
        if entry is None:
            return handler(request)
        waiting = self._limiter.admit(exchange, entry)
        return handler(request) if waiting is None else _after(waiting, request, handler)


async def _after(waiting: Awaitable[None], request: web.BaseRequest, handler: Handler) -> web.StreamResponse:
    await waiting
    return await handler(request)
