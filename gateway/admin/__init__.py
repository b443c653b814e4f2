"""Admin: the operator's side, under `/admin/` on the clients' port.

Each route says which role it needs (`Guarded`), and nothing is served here without one. May read every room below
`app`; only `app` imports it, and merges the tables of routes: path -> method -> Guarded. A path may hold one
parameter, as in `/admin/api/keys/{id}`; `path_argument` gives its value.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.errors import Forbidden
from gateway.identity.principals import ADMIN

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Routes = dict[str, dict[str, Handler]]


class Guarded:
    """A handler that only principals with `role` reach; the others get 403."""

    __slots__ = ("_handler", "role")

    def __init__(self, handler: Handler, role: str = ADMIN) -> None:
        self._handler = handler
        self.role = role

    def __repr__(self) -> str:
        return f"<Guarded {self.role}: {self._handler!r}>"

    def __call__(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        principal = request[EXCHANGE].principal
        if principal is None or self.role not in principal.roles:
            raise Forbidden(f"this needs a key with the role {self.role!r}", code="role_required")
        return self._handler(request)


def path_argument(request: web.BaseRequest) -> str:
    """What stands in the path where the route has `{…}`, decoded; "" if the route has none."""
    exchange = request[EXCHANGE]
    before, brace, rest = exchange.route.partition("{")
    if not brace:
        return ""
    after = rest.partition("}")[2]
    return unquote(exchange.path[len(before) : len(exchange.path) - len(after)])
