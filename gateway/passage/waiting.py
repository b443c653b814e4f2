"""waiting: comments to a client whose stream has nothing to say yet, so that nothing on the way takes it for dead.

A streamed request may wait in the queue, or for an engine that reads a long prompt. Balancers and clients cut what is
silent for a minute. So after each `every_s` a comment line goes out, which every reader of server-sent events passes
over (HTML Living Standard, section 9.2.6). The first one commits to 200 and to a stream; nothing of an answer has been
shown by that, so another upstream may still be asked, and what fails is told by the family's error event.

One timer looks at all that wait; a request that is answered soon costs an entry in a dictionary.
"""

from __future__ import annotations

import asyncio
from time import monotonic

import orjson
from aiohttp import web

from gateway.answer import send_comment
from gateway.dispatch.plan import Plan
from gateway.errors import GatewayError, UpstreamBroken
from gateway.exchange import Exchange
from gateway.upstreams.reply import Reply


class Comments:
    """Those who wait, and the timer. `every_s` 0: no comments."""

    def __init__(self, every_s: float = 15.0) -> None:
        self.every_s = every_s
        self._waiting: dict[Exchange, web.BaseRequest] = {}  # the one that had its last comment longest ago first
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, request: web.BaseRequest, exchange: Exchange, plan: Plan) -> bool:
        """Look after this request until `end`, if it asked for server-sent events; whether it did."""
        if not self.every_s or not exchange.stream or not _events(exchange, plan):
            return False
        exchange.commented_at = monotonic()
        self._waiting[exchange] = request
        if self._timer is None:
            self._wait()
        return True

    def end(self, exchange: Exchange) -> None:
        """Its answer is there, or will not come."""
        self._waiting.pop(exchange, None)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(min(1.0, self.every_s / 4), self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        if not self.every_s:  # a reload switched them off
            self._waiting.clear()
            return
        now = monotonic()
        due = []
        for exchange in self._waiting:
            if now - exchange.commented_at < self.every_s:
                break
            due.append(exchange)
        for exchange in due:
            exchange.commented_at = now
            request = self._waiting[exchange] = self._waiting.pop(exchange)
            send_comment(request, exchange)
        if self._waiting:
            self._wait()


def _events(exchange: Exchange, plan: Plan) -> bool:
    """Whether the answer can be nothing but server-sent events, whoever gives it."""
    if exchange.family == "ollama":
        return False
    native = plan.native  # the runtime's own form, where it has that: Ollama's is lines of JSON
    return not native or not any(native in offer.upstream.runtime.paths for tier in plan.tiers for offer in tier)


def unfit(exchange: Exchange, reply: Reply) -> GatewayError | None:
    """Why this reply cannot follow the head that the client has; None if it can."""
    if reply.status == 200 and reply.streaming:
        return None
    if reply.status < 400:
        return UpstreamBroken(
            f"provider {exchange.provider!r} was asked for a stream and did not stream", code="upstream_incomplete"
        )
    error = GatewayError(f"provider {exchange.provider!r} answered {reply.status}", status=reply.status)
    error.code, error.type, error.blame = "upstream_refused", "upstream_error", "upstream"
    if reply.complete:
        _take_words(error, reply.body())
    return error


def _take_words(error: GatewayError, body: bytes) -> None:
    """Say what the upstream said, in the words of its own error where they can be read."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return
    told = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("message"), str):
        return
    error.message = told["message"]
    error.type = told["type"] if isinstance(told.get("type"), str) else error.type
    error.told_code = told["code"] if isinstance(told.get("code"), str) else None
    error.param = told["param"] if isinstance(told.get("param"), str) else None
