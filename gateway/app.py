"""The composition root: makes every room and joins them. The only module that knows them all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import fields, replace
from time import monotonic
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from gateway.admin import keys as admin_keys
from gateway.admin import queue as admin_queue
from gateway.admin import upstreams as admin_upstreams
from gateway.admin import usage as admin_usage
from gateway.catalog import Catalog
from gateway.config import Config
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.gate import Gate
from gateway.exchange import Exchange
from gateway.fleet.drains import Drains
from gateway.fleet.findings import Findings
from gateway.fleet.names import Names
from gateway.fleet.reload import Reloads
from gateway.handlers import anthropic, local, native, openai
from gateway.handlers.ollama import Ollama
from gateway.handlers.providers import Providers
from gateway.handlers.system import Exposition, Live, Ready
from gateway.identity.book import KeyBook
from gateway.identity.failures import Failures
from gateway.identity.keys import KeyRing
from gateway.identity.shared import Shared
from gateway.ledger.journal import Journal
from gateway.ledger.prices import cost
from gateway.ledger.record import Recent, encode, record
from gateway.ledger.shipper import Shipper
from gateway.limits.limiter import Limiter
from gateway.log import RequestLog
from gateway.metrics import Level, Metrics
from gateway.oidc.issuer import Issuer
from gateway.oidc.signers import Signers
from gateway.oidc.tokens import Tokens
from gateway.passage.continuation import Continuations
from gateway.passage.proxy import Proxy
from gateway.passage.relay import settle_usage
from gateway.passage.resolve import BodyLimits
from gateway.passage.waiting import Comments
from gateway.queueing.fair import FairQueue
from gateway.router import Router, Routes
from gateway.routing.retries import RetryBudget
from gateway.store.client import Store
from gateway.upstreams.control import Control
from gateway.upstreams.health import Prober
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Upstream
from middleware import Handler, compose, stack

_log = logging.getLogger("gateway")

LAG_EVERY_S: Final = 0.25
#: answered without a key, or with any; balancers hold none
OPEN_PATHS: Final = frozenset({"/livez", "/health", "/health/liveliness", "/ping"})
#: answered without a key, and more fully with one, which then must be right
PUBLIC_PATHS: Final = frozenset({"/readyz", "/health/readiness"})
#: every way to a model, by its path
SURFACES: Final = {**openai.SURFACES, **anthropic.SURFACES, **native.SURFACES, **local.SURFACES}
#: where a model is asked to work: these requests are in the ledger, refused ones too
BILLABLE: Final = frozenset(path for path, surface in SURFACES.items() if surface.billable)
#: whose errors have another form than OpenAI's
FAMILIES: Final = {path: surface.family for path, surface in SURFACES.items()} | dict.fromkeys(
    ("/api/tags", "/api/ps", "/api/version"), "ollama"
)

#: where the limits of requests are not asked by the middleware: probes, and the handlers that ask for more than that
UNLIMITED: Final = frozenset({*BILLABLE, *OPEN_PATHS, *PUBLIC_PATHS, "/metrics"})

#: settings that hold until the process ends
FIXED: Final = (
    *("listen", "metrics_listen", "keepalive_timeout_s", "data_dir", "redis_url", "store", "ledger", "demo"),
    "prefix_index_bytes",
    *(field.name for field in fields(Config) if field.name.startswith("oidc_")),
)


class App:
    """The gateway without its listeners. `handle` and `handle_metrics` are what the two listeners serve."""

    def __init__(self, config: Config, keys: KeyRing) -> None:
        self.config = config
        self.catalog = Catalog(config.providers, config.prefix_index_bytes)
        self.metrics = Metrics(CollectorRegistry(), lambda: self.catalog.upstreams)
        self.store = Store.open(config.store, config.redis_url.value, config.data_dir)
        self.metrics.store = self.store.series if self.store is not None else None
        self.limiter = Limiter(config.limits, self.store, part=config.limits_share, cost=cost)
        self.metrics.limiter = self.limiter
        self.recent = Recent()
        self.log = RequestLog() if config.access_log else None
        if self.log is not None:
            self.metrics.log_dropped = self.log.lost
        self.transport = Transport(config.upstream_idle_s)
        self.control = Control()
        self.prober = Prober(
            self.control, lambda: self.catalog.upstreams, self._changed, on_move=self._moved, on_lost=self._lost
        )
        hosts = self.store if config.redis_url and config.store == "auto" else None  # the embedded one has no others
        self.keys = KeyBook(keys, Shared(hosts) if hosts is not None else None)
        self.transport.on_silent = self.prober.hasten
        self.draining = False
        self.ready_asked_at: float | None = None  # when somebody last asked whether to send requests here
        self.drains = Drains(self.catalog, self.store)
        self.findings = Findings(self.prober, lambda: self.catalog.upstreams, hosts) if hosts is not None else None
        self.names = Names(self.catalog, self.prober.wake)
        self.metrics.names = self.names
        self.journal = Journal(config.data_dir / "journal") if config.ledger else None
        self.gate = Gate(FairQueue())
        self._revise_queue(config)
        self.metrics.queue = self.gate.series
        self.comments = Comments(config.comment_s)
        self.continuations = Continuations(config.continue_streams, self.comments)
        self.metrics.continued = self.continuations.counts
        self.dispatcher = Dispatcher(
            self.transport,
            self.journal.open if self.journal is not None else None,
            attempts=config.attempts,
            budget=RetryBudget(config.retry_budget),
            gate=self.gate,
            changed=self._moved,
            doubted=self.prober.doubt,
            policy=config.policy,
            salted=config.cache_salt,
            hedge_after_s=config.hedge_after_s,
            table=lambda: self.catalog.table,
        )
        self.metrics.retries = lambda: self.dispatcher.retries
        self.metrics.attempt_failures = self.dispatcher.failures
        self.metrics.journal = self.journal
        self.shipper = (
            Shipper(self.journal, self.store, keep_bytes=config.ledger_keep_bytes) if self.journal is not None else None
        )
        self._lag_timer: asyncio.TimerHandle | None = None
        self.reloads = Reloads()
        self.metrics.reloads = self.reloads
        self.failures = Failures(config.auth_failures_per_min)
        self.metrics.auth_failures = self.failures.counts
        self.tokens = self._tokens()
        self._handle = self._compose()
        failures = self.failures
        # Loopback and open: a scrape is no use of the product, so it is not counted, and Prometheus holds no key.
        system = self._metrics_routes()
        self.handle_metrics = compose(
            stack(system, system, keys, lambda exchange: None, Level(), self.limiter, system, failures), Router(system)
        )

    def handle(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        """Answer a request of the clients' listener."""
        return self._handle(request)

    def _compose(self) -> Handler:
        routes = self._routes()
        ring, in_flight = self.keys.ring, self.metrics.in_flight
        return compose(
            stack(
                routes, OPEN_PATHS, ring, self._settle, in_flight, self.limiter, UNLIMITED, self.failures, self.tokens,
                SURFACES, FAMILIES, PUBLIC_PATHS,
            ),
            Router(routes),
        )  # fmt: skip

    def apply(self, config: Config) -> list[str]:
        """Go on with `config`: from the next request on, all at once. Gives the settings that only a restart changes.

        Requests that run keep what they began with. A setting takes effect here in one of three ways: it is read from
        `self.config` when it is needed; or it is given to a handler in `_routes`, which are all made anew; or an
        object that lives on has it, and then it is set below. Else it belongs into FIXED.
        """
        before = self.config
        fixed = [name for name in FIXED if getattr(config, name) != getattr(before, name)]
        config = self.config = replace(config, **{name: getattr(before, name) for name in FIXED})
        known = set(self.catalog.upstreams)
        self.catalog.configure(config.providers)
        for upstream in set(self.catalog.upstreams) ^ known:
            _log.info("upstream %s is %s", upstream.name, "removed" if upstream in known else "new")
        self.names.follow(config.dns_refresh_s, config.dns_server)
        self.prober.wake()
        self.limiter.revise(config.limits, config.limits_share)
        self.failures.revise(config.auth_failures_per_min)
        if config.api_keys != before.api_keys:
            self.keys.ring.configure(config.api_keys)
        self.transport.idle_s = config.upstream_idle_s
        self._revise_queue(config)
        if self.shipper is not None:
            self.shipper.keep_bytes = config.ledger_keep_bytes
        self.comments.every_s = config.comment_s
        self.dispatcher.attempts = config.attempts
        self.dispatcher.hedge_after_s = config.hedge_after_s
        self.continuations.enabled = config.continue_streams
        self.dispatcher.policy = config.policy
        self.dispatcher.salted = config.cache_salt
        self.dispatcher.budget.part = config.retry_budget
        logging.getLogger("gateway").setLevel(config.log_level.upper())
        if config.access_log != before.access_log:
            if self.log is not None:
                self.log.flush()
            self.log = RequestLog() if config.access_log else None
            self.metrics.log_dropped = self.log.lost if self.log is not None else int
        self._handle = self._compose()
        return fixed

    def _revise_queue(self, config: Config) -> None:
        queue = self.gate.queue
        queue.most = config.queue_max
        queue.input_weight = config.queue_input_weight
        queue.output_weight = config.queue_output_weight
        weights = {tenant.group: tenant.weight for tenant in config.tenants}
        self.gate.revise(config.queue_s, weights, config.queue_reserve)

    def _routes(self) -> Routes:
        config = self.config
        limits = BodyLimits(config.max_body_bytes, config.body_timeout_s, config.min_body_rate)
        ollama = Ollama(self.control, self._ollama(), enable_pull=config.enable_pull)
        routes: dict[str, dict[str, Handler]] = {
            "/livez": _get(Live()),
            "/readyz": _get(Ready(self._unready, self._degraded)),
            "/metrics": _get(Exposition(self.metrics)),
            "/v1/models": _get(openai.Models(self.catalog)),
            "/api/tags": _get(native.Models(self.catalog)),
            "/api/ps": _get(native.Models(self.catalog, loaded=True)),
            "/api/version": _get(native.Version()),
            "/api/local-llm/providers": _get(Providers(self.catalog, self.control)),
            "/api/local-llm/ollama/list": _get(ollama.list_models),
            "/api/local-llm/ollama/pull": {"POST": ollama.pull},
            "/api/local-llm/ollama/delete": {"POST": ollama.delete},
        }
        for path in ("/health", "/health/liveliness", "/ping"):  # where peers answer, for what probes them
            routes[path] = routes["/livez"]
        routes["/health/readiness"] = routes["/readyz"]
        for path, surface in SURFACES.items():
            reject = config.tools_unsupported == "reject"
            routes[path] = {
                "POST": Proxy(
                    surface,
                    self.catalog,
                    self.dispatcher,
                    limits,
                    self.limiter,
                    self.continuations,
                    comments=self.comments,
                    reject_tools=reject,
                )
            }
        routes |= admin_keys.routes(self.keys)
        routes |= admin_queue.routes(self.gate)
        routes |= admin_upstreams.routes(self.catalog, self.drains)
        if self.journal is not None:
            routes |= admin_usage.routes(self.journal.root, self.store)
        return routes

    def _metrics_routes(self) -> Routes:
        return {
            "/metrics": _get(Exposition(self.metrics)),
            "/livez": _get(Live()),
            "/readyz": _get(Ready(self._unready, self._degraded, inside=True)),
        }

    def _tokens(self) -> Tokens | None:
        issuer = Issuer.configured(self.config)
        return None if issuer is None else Tokens(issuer, Signers(self.control.fetch, issuer))

    def _ollama(self) -> Upstream | None:
        """The Ollama whose models are managed: the one of OLLAMA_BASE_URL."""
        if self.config.ollama_base_url is None:
            return None
        return next((one for one in self.catalog.upstreams if one.provider == "ollama"), None)

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the control session, hear what the upstreams serve, and begin to measure. Needs the running loop."""
        if self.journal is not None:
            self.journal.start()
        if self.store is not None:
            await self.store.start()
        await self.drains.start()
        self.transport.start()
        await self.control.start()
        await self.names.start(self.config.dns_refresh_s, self.config.dns_server)
        await self.prober.probe_due()
        self.catalog.rebuild()
        self.prober.start()
        if self.findings is not None:
            self.findings.start()
        await self.keys.start()
        if self.tokens is not None:
            self.tokens.signers.start()
        if self.shipper is not None:
            self.shipper.start()
        self._lag()

    async def stop(self) -> None:
        if self._lag_timer is not None:
            self._lag_timer.cancel()
        await self.keys.stop()
        await self.names.stop()
        await self.drains.stop()
        if self.tokens is not None:
            await self.tokens.signers.stop()
        if self.findings is not None:
            await self.findings.stop()
        await self.prober.stop()
        await self.control.close()
        self.transport.close()
        if self.journal is not None:
            await self.journal.close()
        if self.shipper is not None:
            await self.shipper.stop()
        await self.limiter.stop()
        if self.store is not None:  # after all that may still have something to write
            await self.store.close()
        if self.log is not None:
            self.log.flush()

    def in_flight(self) -> int:
        """Requests being answered now."""
        return self.metrics.in_flight.value

    def malformed(self, status: int) -> None:
        """Count an answer to bytes that never became a request."""
        key = ("-", status)
        self.metrics.requests[key] = self.metrics.requests.get(key, 0) + 1

    def _changed(self, upstream: Upstream) -> None:
        health = upstream.health
        if health.gone:  # whatever comes back at this address has an empty cache
            upstream.load.index.clear()
        level = logging.INFO if health.status == "ok" else logging.WARNING
        reason = f": {health.reason}" if health.reason else ""
        _log.log(level, "upstream %s is %s%s", upstream.name, health.status, reason)
        self.catalog.rebuild()

    def _lost(self, upstream: Upstream) -> None:
        """Nothing on this host answers any more: what waits there may be asked of another, if there is one."""
        if self.catalog.dispensable(upstream):
            given_up = self.transport.give_up(upstream)
            if given_up:
                _log.warning("upstream %s: %d requests that it has not answered go elsewhere", upstream.name, given_up)

    def _moved(self, upstream: Upstream) -> None:
        """An upstream was ejected, is on trial, or is back."""
        breaker = upstream.breaker
        if breaker.state == "closed":
            _log.info("upstream %s is back, and gets its share little by little", upstream.name)
        elif upstream.health.status != "unreachable":  # of which the prober tells
            _log.warning("upstream %s is ejected: %s", upstream.name, "gone" if breaker.gone else "failing")

    def _unready(self) -> list[str]:
        self.ready_asked_at = monotonic()
        return ["the gateway is shutting down"] if self.draining else []

    def _degraded(self) -> list[str]:
        """What is wrong while requests are still served."""
        found = []
        upstreams = self.catalog.upstreams
        if upstreams and all(upstream.breaker.gone for upstream in upstreams):
            found.append("no upstream answers")
        if self.journal is not None and self.journal.failing:
            found.append(f"the journal cannot be written: {self.journal.failing}")
        if self.store is not None and self.store.trouble:
            found.append(self.store.trouble)
        if self.tokens is not None and self.tokens.signers.trouble:
            found.append(self.tokens.signers.trouble)
        if self.reloads.trouble:
            found.append(self.reloads.trouble)
        found += self.names.troubles
        return found

    def _lag(self, due_at: float = 0.0) -> None:
        """Measure how late the loop runs its timers."""
        now = monotonic()
        if due_at:
            self.metrics.loop_lag.observe(max(0.0, now - due_at))
        self._lag_timer = asyncio.get_running_loop().call_later(LAG_EVERY_S, self._lag, now + LAG_EVERY_S)

    # -- the end of each request --------------------------------------------------------------------------------

    def _settle(self, exchange: Exchange) -> None:
        """Synchronous, once for each request, whatever became of it."""
        settle_usage(exchange)
        self.gate.ended(exchange)
        self.limiter.settle(exchange)
        self.metrics.settle(exchange)
        one = record(exchange)
        self.recent.post(one)
        billable = self.journal is not None and exchange.principal is not None and exchange.route in BILLABLE
        if not billable and self.log is None:
            return
        text = encode(one)
        # Of strangers there is no record: they could fill the disk with nothing but requests.
        if billable:
            assert self.journal is not None
            self.journal.post(one, text)
        if self.log is not None:
            self.log.post(text)


def _get(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}
