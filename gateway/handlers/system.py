"""How the gateway itself is: `/livez`, `/readyz`, `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from gateway.answer import EXCHANGE, send, send_json
from gateway.metrics import CONTENT_TYPE, Metrics


class Live:
    """200 as long as the process answers at all. Says nothing about upstreams: a restart would not mend them."""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        return send_json(request, {"status": "ok"})


class Ready:
    """200 if requests should be sent here, else 503 with the `reasons`. With `degraded` reasons it is still 200: every
    gateway of a fleet may have them at once, and serves.

    Balancers hold no key, so anyone may ask; the reasons name hosts and directories, and are for those with a key, or,
    `inside`, for all.
    """

    def __init__(
        self, reasons: Callable[[], list[str]], degraded: Callable[[], list[str]] = list, *, inside: bool = False
    ) -> None:
        self._reasons = reasons
        self._degraded = degraded
        self._inside = inside

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        told = self._inside or request[EXCHANGE].principal is not None
        reasons = self._reasons()
        if reasons:
            return send_json(request, {"status": "unavailable", **({"reasons": reasons} if told else {})}, 503)
        degraded = self._degraded()
        if degraded:
            return send_json(request, {"status": "degraded", **({"reasons": degraded} if told else {})})
        return send_json(request, {"status": "ok"})


class Exposition:
    """The Prometheus text format. Rendered in a thread: many series take milliseconds that streams would feel."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        text = await asyncio.to_thread(self._metrics.exposition)
        return send(request, text, content_type=CONTENT_TYPE)
