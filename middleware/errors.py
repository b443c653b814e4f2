"""Turns what handlers raise into the error body of the client's API family; nothing foreign gets out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from aiohttp import web

from gateway.answer import EXCHANGE, SENT_CLOSE, send_error, send_last_event
from gateway.errors import Family, GatewayError
from gateway.log import trace
from middleware import Handler

_log = logging.getLogger("gateway.errors")


class Errors:
    """`families`: by path, the API family where it is another than OpenAI's, whoever refuses the request."""

    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families

    async def __call__(self, request: web.BaseRequest, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GatewayError as error:
            known = error
        except asyncio.CancelledError:
            raise
        except ConnectionError as error:  # the client's transport closed under a write
            raise asyncio.CancelledError from error
        except Exception as error:
            exchange = request[EXCHANGE]
            _log.error("request %s failed inside the gateway\n%s", exchange.id, trace(error))
            exchange.outcome = "internal_error"
            known = GatewayError(f"the gateway failed on this request; its log has {exchange.id}")
        exchange = request[EXCHANGE]
        exchange.family = self._families.get(exchange.path, exchange.family)
        exchange.error = known
        if exchange.committed:  # too late to say anything: cut, so that it does not look like an end
            if request.transport is not None:
                request.transport.abort()
            return SENT_CLOSE
        exchange.status = known.status  # what it came to, also where the client has been told 200 and to wait
        if exchange.outcome == "ok":
            exchange.outcome = "upstream_error" if known.blame == "upstream" else "refused"
        if exchange.head_sent:
            return send_last_event(request, known, exchange)
        # A body that nobody read would be taken for the next request; aiohttp lingers on it, we close.
        return send_error(request, known, exchange, close=not request.content.is_eof())
