"""Outermost: opens the Exchange, and settles it whatever happens: each request is counted and recorded once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Container
from itertools import count
from time import monotonic, time

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.exchange import Exchange
from gateway.metrics import Level
from middleware import Handler


class Metrics:
    """`settle` is given each finished Exchange. `routes` are the known paths; others share one label."""

    def __init__(self, routes: Container[str], settle: Callable[[Exchange], None], in_flight: Level) -> None:
        self._routes = routes
        self._settle = settle
        self._in_flight = in_flight
        self._prefix = os.urandom(6).hex()  # unique to this process; the number is unique within it
        self._next = count(1).__next__

    async def __call__(self, request: web.BaseRequest, handler: Handler) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        exchange = Exchange(f"req-{self._prefix}{self._next():08x}", request.method, path, monotonic(), time())
        if path in self._routes:
            exchange.route = path
        exchange.remote = request.remote or ""
        request[EXCHANGE] = exchange
        self._in_flight.value += 1
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            meter = exchange.meter
            # SDKs hang up on reading [DONE], which may be before the last bytes of framing: they have their answer.
            if meter is None or not meter.finished:
                exchange.status = 499
                exchange.outcome = "client_gone"
            raise
        else:
            if not exchange.status:
                exchange.status = response.status
            return response
        finally:
            self._in_flight.value -= 1
            exchange.ended_at = monotonic()
            error = exchange.error
            if error is not None:  # its traceback keeps the frames, they the request and its body: a cycle
                error.__traceback__ = error.__context__ = error.__cause__ = None
            try:
                self._settle(exchange)
            finally:
                unsent = exchange.unsent
                if unsent and (transport := request.transport) is not None:
                    transport.writelines(unsent)
