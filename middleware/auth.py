"""Who is asking: an API key, as `Authorization: Bearer` (OpenAI, Ollama) or `x-api-key` (Anthropic)."""

from __future__ import annotations

from collections.abc import Container

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.errors import Unauthorized
from gateway.identity.keys import KeyRing
from middleware import Answer, Handler


class Auth:
    """Default deny: only the paths in `open_paths` are answered without a key."""

    def __init__(self, keys: KeyRing, open_paths: Container[str]) -> None:
        self._keys = keys
        self._open = open_paths

    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        exchange = request[EXCHANGE]
        if exchange.path in self._open:
            return handler(request)
        presented = _presented(request)
        if presented is None:
            raise Unauthorized("no API key was sent: use `Authorization: Bearer <key>` or `x-api-key: <key>`")
        principal = self._keys.authenticate(presented, exchange.began_unix_s)
        if principal is None:
            raise Unauthorized("this API key is not known here")
        exchange.principal = principal
        exchange.key = principal.name
        return handler(request)


def _presented(request: web.BaseRequest) -> str | None:
    headers = request.headers
    value = headers.get("Authorization")
    if value is not None:
        if value.startswith("Bearer "):  # as every SDK writes it
            return value[7:].strip()
        scheme, _, key = value.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
    return headers.get("x-api-key")
