"""The seat of the rate limits, after auth and before any work. Nothing is limited yet: it lets everything pass."""

from __future__ import annotations

from aiohttp import web

from middleware import Answer, Handler


class RateLimit:
    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        return handler(request)
