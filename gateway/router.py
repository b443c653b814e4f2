"""Router: from a request's path and method to its handler."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.errors import MethodNotAllowed, NotFound
from middleware import Handler

if TYPE_CHECKING:
    from gateway.exchange import Exchange

#: path -> method -> handler
Routes = Mapping[str, Mapping[str, Handler]]


class Router:
    """The innermost handler: exact paths, then methods; everything else does not exist.

    A path with one parameter, "/admin/api/keys/{id}", is looked for only where no exact one is; the parameter is one
    segment and not empty. The Exchange's route is then the path as it stands in the table.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._templates = [(*_around_parameter(path), path) for path in routes if "{" in path]

    def __call__(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        methods = self._routes.get(request[EXCHANGE].path)
        if methods is None:
            methods = self._match(request[EXCHANGE])
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"use {allowed} here", headers=(("Allow", allowed),))
        return handler(request)

    def _match(self, exchange: Exchange) -> Mapping[str, Handler]:
        path = exchange.path
        for before, after, route in self._templates:
            end = len(path) - len(after)
            if path.startswith(before) and path.endswith(after) and end > len(before):
                if "/" in path[len(before) : end]:
                    continue
                exchange.route = route
                return self._routes[route]
        raise NotFound("there is nothing at this path", code="unknown_path")


def _around_parameter(path: str) -> tuple[str, str]:
    before, _, rest = path.partition("{")
    return before, rest.partition("}")[2]
