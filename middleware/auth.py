"""Who is asking: an API key, as `Authorization: Bearer` (OpenAI, Ollama) or `x-api-key` (Anthropic)."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.errors import RateLimited, Unauthorized
from gateway.identity.failures import Failures
from gateway.identity.keys import KeyRing
from middleware import Answer, Handler

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.identity.principals import Principal


class Auth:
    """Default deny: only the paths in `open_paths` are answered without a key."""

    def __init__(self, keys: KeyRing, open_paths: Container[str], failures: Failures) -> None:
        self._keys = keys
        self._open = open_paths
        self._failures = failures

    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        exchange = request[EXCHANGE]
        if exchange.path in self._open:
            return handler(request)
        presented = _presented(request)
        if presented is None:
            self._failures.counts["missing"] += 1
            raise Unauthorized("no API key was sent: use `Authorization: Bearer <key>` or `x-api-key: <key>`")
        if self._failures.addresses:
            principal = self._careful(request, exchange, presented)
        else:
            principal = self._keys.authenticate(presented, exchange.began_unix_s)
        if principal is None:
            self._failures.wrong(request.remote, exchange.began_at)
            raise Unauthorized("this API key is not known here, or it was revoked or has expired")
        exchange.principal = principal
        exchange.key = principal.name
        return handler(request)

    def _careful(self, request: web.BaseRequest, exchange: Exchange, presented: str) -> Principal | None:
        """The same while there are addresses that failed lately: is this one of them, and was it wrong too often?"""
        failing = self._failures.find(request.remote, exchange.began_at)
        if failing is None:
            return self._keys.authenticate(presented, exchange.began_unix_s)
        wait_s = self._failures.wait_s(failing)
        if wait_s:
            principal = self._keys.proven(presented, exchange.began_unix_s)
            if principal is not None and principal.key_id in failing.seen:
                return principal
            self._failures.counts["limited"] += 1
            raise RateLimited(
                "too many wrong API keys came from this address: wait before the next try",
                code="too_many_wrong_keys",
                retry_after_s=wait_s,
            )
        principal = self._keys.authenticate(presented, exchange.began_unix_s)
        if principal is not None:
            self._failures.right(failing, principal.key_id)
        return principal


def _presented(request: web.BaseRequest) -> str | None:
    headers = request.headers
    value = headers.get("Authorization")
    if value is not None:
        if value.startswith("Bearer "):  # as every SDK writes it
            return value[7:].strip()
        scheme, _, key = value.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
    return headers.get("x-api-key")
