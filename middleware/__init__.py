"""The middlewares, and the one place that says their order.

Each is aiohttp-shaped: it takes a request and the next handler, and gives a response. Options are set when it is
made; what belongs to a request lives in its Exchange. Middlewares know identity, limits, metrics, ledger and log,
and how the gateway answers (`answer`); they know no handler, no upstream and nothing of the admin side.

One that only lets a request pass or raises need be no coroutine: it returns what the next handler returns, and costs
no frame while the answer is awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from gateway.errors import Family
    from gateway.exchange import Exchange
    from gateway.identity.failures import Failures
    from gateway.identity.keys import KeyRing
    from gateway.limits.limiter import Limiter
    from gateway.metrics import Level
    from gateway.oidc.tokens import Tokens

Answer = Awaitable[web.StreamResponse]
Handler = Callable[[web.BaseRequest], Answer]


class Middleware(Protocol):
    def __call__(self, request: web.BaseRequest, handler: Handler) -> Answer: ...


def stack(
    routes: Container[str],
    open_paths: Container[str],
    keys: KeyRing,
    settle: Callable[[Exchange], None],
    in_flight: Level,
    limiter: Limiter,
    limited_elsewhere: Container[str],
    failures: Failures,
    tokens: Tokens | None = None,
    forwarded: Container[str] = (),
    families: Mapping[str, Family] | None = None,
    public_paths: Container[str] = (),
) -> tuple[Middleware, ...]:
    """The order, outermost first. Metrics sees every answer, so that 401 and 429 are counted; errors are rendered
    before metrics reads the status; hygiene comes before auth, since a request that must not be is nobody's.
    """
    from middleware.auth import Auth
    from middleware.errors import Errors
    from middleware.hygiene import Hygiene
    from middleware.metrics import Metrics
    from middleware.ratelimit import RateLimit

    return (
        Metrics(routes, settle, in_flight),
        Errors(families or {}),
        Hygiene(routes, forwarded),
        Auth(keys, open_paths, failures, tokens, public_paths),
        RateLimit(limiter, limited_elsewhere),
    )


def compose(middlewares: Sequence[Middleware], handler: Handler) -> Handler:
    """Wrap `handler` in `middlewares`, the first outermost."""
    for middleware in reversed(middlewares):
        handler = partial(middleware, handler=handler)
    return handler
