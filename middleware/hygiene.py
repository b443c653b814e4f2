"""Refuses what HTTP allows and nobody needs: odd versions, methods, targets and encodings.

aiohttp's server normalises nothing and refuses little (its router would); requests are matched here by their raw
target, so only targets that match no route need a look. RFC 9110 and 9112 name the status codes.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11

from gateway.answer import EXCHANGE
from gateway.errors import BadRequest, MethodNotAllowed, UnsupportedMedia, VersionNotSupported
from gateway.wire.headers import raw_target_problem, underscore_refused
from middleware import Answer, Handler

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UNDERSCORE: Final = ord("_")
_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Hygiene:
    """`forwarded`: routes whose headers are looked at where they are made into those for the upstream."""

    def __init__(self, routes: Container[str], forwarded: Container[str] = ()) -> None:
        self._routes = routes
        self._forwarded = forwarded

    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer:
        version = request.version
        if version is not HttpVersion11 and version not in (HttpVersion11, HttpVersion10):
            raise VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are spoken here")
        method = request.method
        if method not in _METHODS:
            raise MethodNotAllowed(f"the method {method} is not allowed here")
        exchange = request[EXCHANGE]
        if exchange.path not in self._routes:
            exchange.path = _path(request)
            if exchange.path in self._routes:
                exchange.route = exchange.path
        if method in _BODILESS and request.body_exists:
            raise BadRequest(f"a {method} request carries no body")
        if exchange.path not in self._forwarded and any(_UNDERSCORE in name for name, _ in request.raw_headers):
            raise underscore_refused()
        if "Content-Encoding" in request.headers:
            raise UnsupportedMedia("send the request body without a Content-Encoding")
        return handler(request)


def _path(request: web.BaseRequest) -> str:
    """The path of a target that is no route as it stands: absolute-form, or something to refuse."""
    target = request.raw_path
    problem = raw_target_problem(target, request.headers.get("Host", ""))
    if problem is not None:
        raise BadRequest(f"the request target is refused: {problem}")
    path = target.partition("?")[0]
    return path if path.startswith("/") else "/" + path.partition("://")[2].partition("/")[2]
