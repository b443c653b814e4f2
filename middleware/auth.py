"""Who is asking: an API key or a token, as `Authorization: Bearer` (OpenAI, Ollama) or `x-api-key` (Anthropic)."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.errors import Forbidden, RateLimited, Unauthorized
from gateway.identity.failures import Failures
from gateway.identity.keys import KeyRing
from gateway.oidc.issuer import looks_like_token
from gateway.oidc.tokens import FORGED
from middleware import Answer, Handler

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.identity.principals import Principal
    from gateway.oidc.tokens import Tokens


class Auth:
    """Default deny: only the paths in `open_paths` are answered without a key, or a token where `tokens` are taken;
    and those in `public_paths`, but there a key that is shown must be right.
    """

    def __init__(
        self,
        keys: KeyRing,
        open_paths: Container[str],
        failures: Failures,
        tokens: Tokens | None = None,
        public_paths: Container[str] = (),
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._open = open_paths
        self._public = public_paths
        self._failures = failures

    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        exchange = request[EXCHANGE]
        if exchange.path in self._open:
            return handler(request)
        presented = _presented(request)
        if presented is None:
            if exchange.path in self._public:
                return handler(request)
            self._failures.counts["missing"] += 1
            raise Unauthorized("no API key was sent: use `Authorization: Bearer <key>` or `x-api-key: <key>`")
        if self._tokens is not None and looks_like_token(presented):
            principal = self._tokens.known(presented, exchange.began_unix_s)
            if principal is None:
                return self._verify(self._tokens, request, presented, handler)
        elif self._failures.addresses:
            principal = self._careful(request, exchange, presented)
        else:
            principal = self._keys.authenticate(presented, exchange.began_unix_s)
        if principal is None:
            self._failures.wrong(request.remote, exchange.began_at)
            raise Unauthorized("this API key is not known here, or it was revoked or has expired")
        exchange.principal = principal
        exchange.key = principal.name
        return handler(request)

    async def _verify(
        self, tokens: Tokens, request: web.BaseRequest, token: str, handler: Handler
    ) -> web.StreamResponse:
        """A token that is new here.

        A signature cannot be guessed, so good ones are taken from an address that fails, too: it may be a proxy's, and
        those behind it renew their tokens all the time.
        """
        exchange = request[EXCHANGE]
        try:
            principal = await tokens.verify(token, exchange.began_unix_s)
        except (Unauthorized, Forbidden) as error:
            if error.code != FORGED:  # an old token, or one for others
                self._failures.counts["unknown"] += 1
                raise
            failing = self._failures.find(request.remote, exchange.began_at)
            if failing is not None and (wait_s := self._failures.wait_s(failing)):
                raise self._limited(wait_s) from None
            self._failures.wrong(request.remote, exchange.began_at)
            raise
        exchange.principal = principal
        exchange.key = principal.name
        return await handler(request)

    def _limited(self, wait_s: float) -> RateLimited:
        self._failures.counts["limited"] += 1
        return RateLimited(
            "too many wrong API keys came from this address: wait before the next try",
            code="too_many_wrong_keys",
            retry_after_s=wait_s,
        )

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
            raise self._limited(wait_s)
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
