"""`GET /api/local-llm/providers`: every provider with its models and its health, asked for now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from aiohttp import web

from gateway.answer import EXCHANGE, send_json
from gateway.config import Model
from gateway.runtimes import Runtime
from gateway.upstreams.control import Control
from gateway.upstreams.upstream import Health, HealthStatus, Upstream

#: A finding this young is reported again: many callers at once cost one ping per upstream.
MAX_AGE_S: Final = 1.0
#: The answer waits no longer than this for pings: a little more than one may take (2 s), to hear its own verdict.
PING_S: Final = 2.2


class Provider(Protocol):
    """What is needed of a provider in the catalog's table."""

    @property
    def name(self) -> str: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def models(self) -> tuple[Model, ...]: ...
    @property
    def upstreams(self) -> tuple[Upstream, ...]: ...
    @property
    def hint(self) -> str: ...


class Table(Protocol):
    @property
    def providers(self) -> Sequence[Provider]: ...


class Catalog(Protocol):
    @property
    def table(self) -> Table: ...


class Providers:
    """The handler. Pings cost no tokens and wake no model.

    Answers `{"providers": [{"provider", "runtime", "baseUrl", "models": [{"apiName", "uiName",
    "supportsTools", "aliases"?, "contextWindow"?}], "health": {"status", "reason", "latencyMs",
    "checkedAt"}, "upstreams"?, "hint"?}]}`. `status` is "ok", "degraded" or "unreachable"; `latencyMs` is
    null where nothing answered; `checkedAt` is RFC 3339 in UTC. `upstreams` lists each host where a
    provider has several. Models that the caller's key may not use are left out.
    """

    def __init__(self, catalog: Catalog, control: Control) -> None:
        self._catalog = catalog
        self._control = control

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        providers = self._catalog.table.providers
        exchange = request[EXCHANGE]
        began_at = self._control.clock()
        await self._ping({upstream for provider in providers for upstream in provider.upstreams})
        now = self._control.clock()
        exchange.upstream_s = now - began_at
        document = {"providers": [_provider(provider, exchange.principal, now) for provider in providers]}
        return send_json(request, document)

    async def _ping(self, upstreams: Iterable[Upstream]) -> None:
        pings = [asyncio.ensure_future(self._control.fresh(upstream, MAX_AGE_S)) for upstream in upstreams]
        if not pings:
            return
        try:
            # A large fleet may not be through in time: the rest is reported as last seen.
            done, _ = await asyncio.wait(pings, timeout=PING_S)
            for ping in done:
                ping.result()
        finally:
            for ping in pings:
                ping.cancel()


def _provider(provider: Provider, principal: Any, now: float) -> dict[str, Any]:
    healths = [upstream.health for upstream in provider.upstreams]
    document: dict[str, Any] = {
        "provider": provider.name,
        "runtime": provider.runtime.name,
        "baseUrl": _public_url(provider.upstreams[0]) if provider.upstreams else None,
        "models": [_model(model) for model in provider.models if principal is None or principal.may_use(model.name)],
        "health": _health(_summary(provider.upstreams), now),
    }
    if len(healths) > 1:
        document["upstreams"] = [
            {
                "name": upstream.name,
                "baseUrl": _public_url(upstream),
                "models": [name for name in upstream.models if principal is None or principal.may_use(name)],
                "health": _health(upstream.health, now),
                "state": upstream.breaker.state,
            }
            for upstream in provider.upstreams
        ]
    hint = provider.hint or ("" if provider.models else _empty_hint(provider, principal))
    if hint:
        document["hint"] = hint
    return document


def _model(model: Model) -> dict[str, Any]:
    document: dict[str, Any] = {
        "apiName": model.name,
        "uiName": model.ui_name,
        "supportsTools": model.supports_tools,
    }
    if model.aliases:
        document["aliases"] = list(model.aliases)
    if model.context_window is not None:
        document["contextWindow"] = model.context_window
    return document


def _empty_hint(provider: Provider, principal: Any) -> str:
    hint = (
        "no models are configured for this provider: list them under OPENAI_COMPATIBLE_DATA, "
        f'in the entry with "provider": "{provider.name}", as "models": [{{"apiName": "..."}}].'
    )
    reported = sorted({name for upstream in provider.upstreams for name in upstream.models})
    if principal is not None:
        reported = [name for name in reported if principal.may_use(name)]
    if reported:
        hint += f" The runtime itself lists: {', '.join(reported[:20])}."
    return hint


def _summary(upstreams: Sequence[Upstream]) -> Health:
    """One health for a provider: ok if every host is, unreachable if none answers, else degraded."""
    healths = [upstream.health for upstream in upstreams]
    if len(healths) == 1:
        return healths[0]
    if not healths:
        return Health("unreachable", "no addresses are configured")
    bad = [upstream for upstream in upstreams if upstream.health.status != "ok"]
    status: HealthStatus = "degraded"
    if not bad:
        status = "ok"
    elif all(health.status == "unreachable" for health in healths):
        status = "unreachable"
    reason = "; ".join(f"{upstream.name}: {upstream.health.reason}" for upstream in bad)
    latencies = [health.latency_s for health in healths if health.latency_s is not None]
    return Health(
        status,
        reason,
        max(latencies, default=None),
        min(health.checked_at for health in healths),
    )


def _health(health: Health, now: float) -> dict[str, Any]:
    known = health.status != "unknown"
    checked_unix_s = time.time() - (now - health.checked_at)
    return {
        # a ping that has not come back in time is no sign of life
        "status": health.status if known else "unreachable",
        "reason": health.reason,
        "latencyMs": None if health.latency_s is None else round(health.latency_s * 1000, 1),
        "checkedAt": datetime.fromtimestamp(checked_unix_s, UTC).isoformat(timespec="milliseconds") if known else None,
    }


def _public_url(upstream: Upstream) -> str:
    """The base URL without the user and password it may hold."""
    return f"{upstream.scheme}://{upstream.netloc}{upstream.prefix}"
