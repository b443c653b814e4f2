"""Every metric of the gateway, declared once, on a registry that is handed in.

The hot path does not go through the client library's children and locks: it adds to plain integers here, and the
library reads them when it is scraped (`Metrics.collect`, the documented way of a custom collector). One observation
costs a bisect and two additions.

Names follow the OpenTelemetry GenAI semantic conventions in Prometheus form where they exist (`gen_ai_*`, their
bucket bounds included), `gateway_*` elsewhere. Label values come from configuration only: route templates, catalog
models, providers, key-independent; whatever a client invents is counted under "-".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway import __version__
from gateway.queueing.fair import PRIORITIES

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.fleet.names import Names
    from gateway.fleet.reload import Reloads
    from gateway.ledger.journal import Journal
    from gateway.limits.limiter import Limiter
    from gateway.upstreams.upstream import Upstream

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Bounds of the OpenTelemetry GenAI conventions.
DURATION_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TTFT_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TPOT_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS: Final = tuple(float(4**power) for power in range(14))
OVERHEAD_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
LAG_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
STORE_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 1.0)


class Histogram:
    """Counts by bucket (upper bounds inclusive, the last is +Inf) and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative buckets as the exposition format wants them."""
        total = 0
        out = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            out.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return out


class Level:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class ModelSeries:
    """The series of one (operation, provider, model)."""

    __slots__ = (
        "cached",
        "completion",
        "duration",
        "estimated",
        "failures",
        "prompt",
        "reasoning",
        "tpot",
        "ttft",
        "unpriced",
    )

    def __init__(self) -> None:
        self.duration = Histogram(DURATION_S)
        self.failures: dict[str, Histogram] = {}
        self.ttft = Histogram(TTFT_S)
        self.tpot = Histogram(TPOT_S)
        self.prompt = Histogram(TOKENS)
        self.completion = Histogram(TOKENS)
        self.cached = 0
        self.reasoning = 0
        self.estimated = 0
        self.unpriced = 0

    def failure(self, exchange: Exchange) -> Histogram:
        """The durations of requests that ended like this one: by the error's code, else by the outcome."""
        kind = exchange.error.code if exchange.error is not None else exchange.outcome
        found = self.failures.get(kind)
        if found is None:
            found = self.failures[kind] = Histogram(DURATION_S)
        return found


class QueueSeries:
    """The series of the queue; how many wait, by rank, is asked at scrape time. `shed`: by deadline, full or closed."""

    __slots__ = ("depths", "shed", "tenants", "waits")

    def __init__(self, depths: Callable[[], list[int]], tenants: Callable[[], int]) -> None:
        self.depths = depths
        self.tenants = tenants
        self.waits = Histogram(TTFT_S)
        self.shed: dict[str, int] = {}


class StoreSeries:
    """The series of the store. `errors` by kind: StoreAway's, and reply (a script or command is wrong)."""

    __slots__ = ("errors", "latency", "round_trips", "up")

    def __init__(self) -> None:
        self.up = Level()
        self.errors: dict[str, int] = {}
        self.round_trips = 0
        self.latency = Histogram(STORE_S)


class Metrics(Collector):
    """The gateway's collectors. `upstreams` is asked at scrape time for those that exist then."""

    def __init__(self, registry: CollectorRegistry, upstreams: Callable[[], Iterable[Upstream]] = tuple) -> None:
        self.registry = registry
        self._upstreams = upstreams
        self.requests: dict[tuple[str, int], int] = {}
        self.models: dict[tuple[str, str, str], ModelSeries] = {}
        self.overhead = Histogram(OVERHEAD_S)
        self.loop_lag = Histogram(LAG_S)
        self.in_flight = Level()
        self.store: StoreSeries | None = None  # none without a store
        # asked at scrape time: whoever counts these sets them
        self.retries: Callable[[], int] = int
        self.attempt_failures: dict[str, int] = {}  # by outcome
        self.continued: Mapping[str, int] = {}
        self.journal: Journal | None = None
        self.queue: QueueSeries | None = None
        self.log_dropped: Callable[[], int] = int
        self.limiter: Limiter | None = None
        self.reloads: Reloads | None = None
        self.names: Names | None = None
        self.auth_failures: dict[str, int] = {}  # by reason
        registry.register(self)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    # -- where facts happen -------------------------------------------------------------------------------------

    def settle(self, exchange: Exchange) -> None:
        """Count a finished exchange."""
        key = (exchange.route, exchange.status)
        try:
            self.requests[key] += 1
        except KeyError:
            self.requests[key] = 1
        duration_s = exchange.ended_at - exchange.began_at
        self.overhead.observe(max(0.0, duration_s - exchange.upstream_s - exchange.waited_s - exchange.queued_s))
        if not exchange.model:
            return
        label = (exchange.operation, exchange.provider, exchange.model)
        series = self.models.get(label)
        if series is None:
            series = self.models[label] = ModelSeries()
        if exchange.outcome == "ok":
            series.duration.observe(duration_s)
        else:  # apart, by its reason: an outage is no fast answer
            series.failure(exchange).observe(duration_s)
        usage = exchange.usage
        if usage is None:
            return
        series.prompt.observe(usage.prompt)
        series.completion.observe(usage.completion)
        series.cached += usage.cached
        series.reasoning += usage.reasoning
        series.estimated += usage.estimated
        series.unpriced += exchange.cost is None
        meter = exchange.meter
        if meter is None or not exchange.stream:
            return
        first_at = meter.first_content_at
        if first_at:
            series.ttft.observe(first_at - exchange.began_at)
            if meter.events > 1:
                series.tpot.observe((meter.last_content_at - first_at) / (meter.events - 1))

    # -- what a scrape sees -------------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        """The whole registry in the text format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        return ()  # the series are not known in advance, and asking must not scrape

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("gateway_build_info", "The running version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        requests = CounterMetricFamily(
            "gateway_requests", "Finished requests by route template and status.", labels=["route", "status"]
        )
        for (route, status), count in list(self.requests.items()):
            requests.add_metric([route, str(status)], count)
        yield requests
        yield GaugeMetricFamily(
            "gateway_requests_in_flight", "Requests being answered now.", value=self.in_flight.value
        )
        refused = CounterMetricFamily(
            "gateway_auth_failures", "Requests refused for want of a valid key.", labels=["reason"]
        )
        for reason, count in self.auth_failures.items():
            refused.add_metric([reason], count)
        yield refused
        yield CounterMetricFamily(
            "gateway_upstream_retries", "Requests sent again because an upstream failed before it answered.",
            value=self.retries(),
        )  # fmt: skip
        outcomes = CounterMetricFamily(
            "gateway_attempt_failures", "Attempts that failed, by outcome.", labels=["outcome"]
        )
        for outcome, count in list(self.attempt_failures.items()):
            outcomes.add_metric([outcome], count)
        yield outcomes
        continued = CounterMetricFamily(
            "gateway_streams_continued",
            "Streams whose engine failed in the middle: another joined in, all but their end was there, or not.",
            labels=["outcome"],
        )
        for outcome, count in self.continued.items():
            continued.add_metric([outcome], count)
        yield continued
        yield CounterMetricFamily(
            "gateway_log_lines_dropped",
            "Request log lines lost because nobody read them.",
            value=self.log_dropped(),
        )
        yield _histogram(
            "gateway_overhead_seconds",
            "Time of a request not spent waiting for the upstream or the client.",
            self.overhead,
        )
        yield _histogram("gateway_event_loop_lag_seconds", "How late the event loop runs what is due.", self.loop_lag)
        yield from self._model_families()
        yield from self._upstream_families()
        if self.queue is not None:
            yield from _queue_families(self.queue)
        if self.journal is not None:
            yield from _journal_families(self.journal)
        if self.reloads is not None:
            yield from _reload_families(self.reloads)
        if self.names is not None and self.names.known:
            yield from _name_families(self.names)
        if self.limiter is not None:
            yield from _limit_families(self.limiter)
        if self.store is not None:
            yield from self._store_families(self.store)

    def _model_families(self) -> Iterator[Metric]:
        names = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]
        series = list(self.models.items())
        duration = HistogramMetricFamily(
            "gen_ai_server_request_duration_seconds",
            "Whole time of a request; error_type is empty where it was answered.",
            labels=[*names, "error_type"],
        )
        for label, one in series:
            for kind, durations in [("", one.duration), *one.failures.items()]:
                duration.add_metric([*label, kind], durations.buckets(), durations.sum)
        yield duration
        for name, text, part in (
            ("gen_ai_server_time_to_first_token_seconds", "Until the first content of a stream.", "ttft"),
            (
                "gen_ai_server_time_per_output_token_seconds",
                "Between two pieces of content, per stream.",
                "tpot",
            ),
        ):
            family = HistogramMetricFamily(name, text, labels=names)
            for label, one in series:
                histogram: Histogram = getattr(one, part)
                family.add_metric(list(label), histogram.buckets(), histogram.sum)
            yield family
        tokens = HistogramMetricFamily(
            "gen_ai_client_token_usage", "Tokens of a request.", labels=[*names, "gen_ai_token_type"]
        )
        for label, one in series:
            tokens.add_metric([*label, "input"], one.prompt.buckets(), one.prompt.sum)
            tokens.add_metric([*label, "output"], one.completion.buckets(), one.completion.sum)
        yield tokens
        for name, text, part in (
            ("gateway_cached_tokens", "Prompt tokens that the runtime had in its cache.", "cached"),
            ("gateway_reasoning_tokens", "Output tokens spent on reasoning.", "reasoning"),
            ("gateway_estimated_usage", "Requests whose usage was counted here, not reported.", "estimated"),
            ("gateway_unpriced_requests", "Requests whose cost is unknown: their model has no price.", "unpriced"),
        ):
            counter = CounterMetricFamily(name, text, labels=names)
            for label, one in series:
                counter.add_metric(list(label), getattr(one, part))
            yield counter

    def _upstream_families(self) -> Iterator[Metric]:
        names = ["provider", "upstream"]
        in_flight = GaugeMetricFamily("gateway_upstream_in_flight", "Requests on an upstream now.", labels=names)
        served = CounterMetricFamily("gateway_upstream_requests", "Requests sent to an upstream.", labels=names)
        failed = CounterMetricFamily("gateway_upstream_failures", "Requests that an upstream failed.", labels=names)
        up = GaugeMetricFamily(
            "gateway_upstream_up",
            "The last probe: 1 ok, 0.5 degraded, 0 unreachable or unknown.",
            labels=names,
        )
        draining = GaugeMetricFamily(
            "gateway_upstream_draining", "1 while an operator keeps new requests away.", labels=names
        )
        probe_s = GaugeMetricFamily("gateway_upstream_probe_seconds", "Round trip of the last probe.", labels=names)
        state = GaugeMetricFamily(
            "gateway_upstream_state",
            "The circuit breaker: 1 closed, 0.5 half-open (one request is on trial), 0 open (ejected).",
            labels=names,
        )
        ejections = CounterMetricFamily("gateway_upstream_ejections", "Times an upstream was ejected.", labels=names)
        for upstream in self._upstreams():
            label = [upstream.provider, upstream.name]
            in_flight.add_metric(label, upstream.in_flight)
            served.add_metric(label, upstream.served)
            failed.add_metric(label, upstream.failed)
            draining.add_metric(label, int(upstream.draining))
            up.add_metric(label, {"ok": 1.0, "degraded": 0.5}.get(upstream.health.status, 0.0))
            if upstream.health.latency_s is not None:
                probe_s.add_metric(label, upstream.health.latency_s)
            state.add_metric(label, {"closed": 1.0, "half_open": 0.5}.get(upstream.breaker.state, 0.0))
            ejections.add_metric(label, upstream.breaker.opened)
        yield from (in_flight, served, failed, up, draining, probe_s, state, ejections)

    def _store_families(self, store: StoreSeries) -> Iterator[Metric]:
        yield GaugeMetricFamily("gateway_store_up", "1 if the store can be used.", value=store.up.value)
        errors = CounterMetricFamily("gateway_store_errors", "Calls that the store did not answer.", labels=["kind"])
        for kind, count in list(store.errors.items()):
            errors.add_metric([kind], count)
        yield errors
        yield CounterMetricFamily("gateway_store_round_trips", "Commands sent to the store.", value=store.round_trips)
        yield _histogram("gateway_store_latency_seconds", "Time of a call that was answered.", store.latency)


def _queue_families(queue: QueueSeries) -> Iterator[Metric]:
    depth = GaugeMetricFamily("gateway_queue_depth", "Requests that wait for room on an upstream.", labels=["class"])
    for priority, count in zip(PRIORITIES, queue.depths(), strict=True):
        depth.add_metric([priority], count)
    yield depth
    yield GaugeMetricFamily("gateway_queue_tenants", "Tenants that have requests waiting.", value=queue.tenants())
    yield _histogram("gateway_queue_wait_seconds", "Time of a wait, whatever its end.", queue.waits)
    shed = CounterMetricFamily("gateway_queue_shed", "Requests that waited for nothing.", labels=["reason"])
    for reason, count in list(queue.shed.items()):
        shed.add_metric([reason], count)
    yield shed


def _journal_families(journal: Journal) -> Iterator[Metric]:
    yield CounterMetricFamily("gateway_journal_errors", "Writes that the disk refused.", value=journal.errors)
    yield GaugeMetricFamily("gateway_journal_held_records", "Records that wait in memory.", value=journal.held)
    yield CounterMetricFamily("gateway_journal_lost_records", "Records lost for want of memory.", value=journal.lost)


def _reload_families(reloads: Reloads) -> Iterator[Metric]:
    results = CounterMetricFamily(
        "gateway_config_reloads", "Times the configuration was read again, by what became of it.", labels=["result"]
    )
    for result, count in reloads.results.items():
        results.add_metric([result], count)
    yield results
    yield GaugeMetricFamily(
        "gateway_config_last_reload_ok",
        "0 if the configuration as it stands on disk was refused.",
        value=int(not reloads.trouble),
    )


def _name_families(names: Names) -> Iterator[Metric]:
    lookups = CounterMetricFamily("gateway_name_lookups", "Look-ups of an upstream's name.", labels=["name", "result"])
    hosts = GaugeMetricFamily("gateway_name_hosts", "Hosts behind a name, by its last good answer.", labels=["name"])
    for lookup, known in names.known.items():
        lookups.add_metric([str(lookup), "answered"], known.answered)
        lookups.add_metric([str(lookup), "failed"], known.failed)
        hosts.add_metric([str(lookup)], len(known.hosts))
    yield from (lookups, hosts)


def _limit_families(limiter: Limiter) -> Iterator[Metric]:
    refused = CounterMetricFamily(
        "gateway_limit_refused", "Requests refused by a limit or a budget.", labels=["limit", "scope"]
    )
    for label, count in list(limiter.refused.items()):
        refused.add_metric(list(label), count)
    yield refused
    observed = CounterMetricFamily(
        "gateway_limit_observed", "Requests that an observed limit would have refused.", labels=["limit"]
    )
    for name, count in list(limiter.observed.items()):
        observed.add_metric([name], count)
    yield observed
    yield GaugeMetricFamily(
        "gateway_limits_degraded", "1 while the store is away and limits are kept alone.", value=int(limiter.degraded)
    )


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    family.add_metric([], histogram.buckets(), histogram.sum)
    return family
