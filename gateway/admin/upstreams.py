"""`/admin/api/upstreams`: each address that is asked, how it is, and whether it gets requests. Role "admin".

    GET  /admin/api/upstreams                 {"rows": [upstream …]}
    GET  /admin/api/upstreams/{name}          upstream
    POST /admin/api/upstreams/{name}/drain    upstream, which gets no new request; those that run on it end
    POST /admin/api/upstreams/{name}/resume   upstream, which gets requests again

An upstream is {"name", "provider", "runtime", "url", "state": "active" or "draining", "health": {"status", "reason",
"latency_ms", "checked_at"}, "breaker", "in_flight", "max_in_flight", "room", "served", "failed", "weight", "models",
"loaded", "windows", "learned", "drained": null or {"at", "by"}}. `room`: requests it would take now, null for any
number; `loaded`: models that are in memory, where the runtime tells; `learned`: what its answers taught this gateway.
`in_flight` is this gateway's own: others that share the fleet have theirs.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from aiohttp import web

from gateway.admin import Guarded, Routes, path_argument
from gateway.answer import EXCHANGE, send_json
from gateway.catalog import Catalog, nearest
from gateway.errors import NotFound
from gateway.fleet.drains import Drains
from gateway.upstreams.upstream import Upstream


def routes(catalog: Catalog, drains: Drains) -> Routes:
    upstreams = Upstreams(catalog, drains)
    return {
        "/admin/api/upstreams": {"GET": Guarded(upstreams.rows)},
        "/admin/api/upstreams/{name}": {"GET": Guarded(upstreams.show)},
        "/admin/api/upstreams/{name}/drain": {"POST": Guarded(upstreams.drain)},
        "/admin/api/upstreams/{name}/resume": {"POST": Guarded(upstreams.resume)},
    }


class Upstreams:
    """The handlers."""

    def __init__(self, catalog: Catalog, drains: Drains) -> None:
        self._catalog = catalog
        self._drains = drains

    async def rows(self, request: web.BaseRequest) -> web.StreamResponse:
        return send_json(request, {"rows": [self._document(one) for one in self._catalog.upstreams]})

    async def show(self, request: web.BaseRequest) -> web.StreamResponse:
        return send_json(request, self._document(self._named(request)))

    async def drain(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._say(request, True)

    async def resume(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._say(request, False)

    async def _say(self, request: web.BaseRequest, draining: bool) -> web.StreamResponse:
        upstream = self._named(request)
        await self._drains.say(upstream.identity, draining, request[EXCHANGE].principal.name)
        return send_json(request, self._document(upstream))

    def _named(self, request: web.BaseRequest) -> Upstream:
        name = path_argument(request)
        names = {upstream.name: upstream for upstream in self._catalog.upstreams}
        if name not in names:
            near = nearest(name, names)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise NotFound(f"there is no upstream {name[:200]!r}{hint}", code="upstream_not_found")
        return names[name]

    def _document(self, upstream: Upstream) -> dict[str, Any]:
        word = self._drains.word(upstream.identity)
        health = upstream.health
        known = health.status != "unknown"
        limit = upstream.limit
        return {
            "name": upstream.name,
            "provider": upstream.provider,
            "runtime": upstream.runtime.name,
            "url": f"{upstream.scheme}://{upstream.place}{upstream.prefix}",
            "state": "draining" if upstream.draining else "active",
            "health": {
                "status": health.status,
                "reason": health.reason,
                "latency_ms": None if health.latency_s is None else round(health.latency_s * 1000, 1),
                "checked_at": _utc(time.time() - (monotonic() - health.checked_at)) if known else None,
            },
            "breaker": upstream.breaker.state,
            "in_flight": upstream.in_flight,
            "max_in_flight": limit,
            "room": None if limit is None else max(0, limit - upstream.in_flight),
            "served": upstream.served,
            "failed": upstream.failed,
            "weight": upstream.weight,
            "models": list(upstream.models),
            "loaded": sorted(upstream.loaded),
            "windows": dict(upstream.windows),
            "learned": _learned(upstream),
            "drained": None if word is None or not word.draining else {"at": _utc(word.at), "by": word.by},
        }


def _learned(upstream: Upstream) -> dict[str, Any]:
    """By model: prompt tokens a second, and the seconds that loading it takes; and the tokens believed cached there."""
    load = upstream.load
    return {
        "prefill_tokens_per_s": {
            model: round(rate.value) for model, rate in load.rates.items() if rate.value is not None
        },
        "loading_s": {model: round(one.seconds, 1) for model, one in load.loading.items()},
        "cached_tokens": load.index.tokens,
    }


def _utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
