"""Histograms and the exposition, apart from any request."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gateway.exchange import Exchange
from gateway.metrics import DURATION_S, TOKENS, TPOT_S, TTFT_S, Histogram, Metrics
from gateway.wire.usage import SseMeter, Usage


def test_bounds_are_those_of_the_genai_conventions() -> None:
    assert DURATION_S[0] == 0.01
    assert DURATION_S[-1] == 81.92
    assert TTFT_S[:3] == (0.001, 0.005, 0.01)
    assert TPOT_S[-1] == 2.5
    assert tuple(float(4**n) for n in range(14)) == TOKENS
    for bounds in (DURATION_S, TTFT_S, TPOT_S, TOKENS):
        assert list(bounds) == sorted(set(bounds))


def test_a_bound_is_inclusive_and_buckets_add_up() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.1, 1e9):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 6.0)]
    assert histogram.sum == pytest.approx(1e9 + 7.1)


def exchange(**more: object) -> Exchange:
    one = Exchange("req-1", "POST", "/v1/chat/completions", 10.0, 1_700_000_000.0)
    one.route, one.operation, one.provider, one.model, one.status = one.path, "chat", "p", "m", 200
    one.ended_at, one.upstream_s = 12.0, 1.5
    for name, value in more.items():
        setattr(one, name, value)
    return one


def value(metrics: Metrics, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no {name} with {labels}")


def test_settle() -> None:
    metrics = Metrics(CollectorRegistry())
    meter = SseMeter()
    meter.first_content_at, meter.last_content_at, meter.events = 10.5, 11.5, 11
    metrics.settle(exchange(stream=True, meter=meter, usage=Usage(40, 11, cached=30, reasoning=4)))
    metrics.settle(exchange(usage=Usage(2, 1, estimated=True)))
    metrics.settle(exchange(status=502))
    metrics.settle(exchange(model="", status=404, route="-"))
    assert value(metrics, "gateway_requests_total", status="200") == 2
    assert value(metrics, "gateway_requests_total", route="-", status="404") == 1
    assert value(metrics, "gen_ai_server_request_duration_seconds_sum") == 6.0
    assert value(metrics, "gen_ai_server_time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "gen_ai_server_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert value(metrics, "gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 42
    assert value(metrics, "gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 12
    assert value(metrics, "gateway_cached_tokens_total") == 30
    assert value(metrics, "gateway_reasoning_tokens_total") == 4
    assert value(metrics, "gateway_estimated_usage_total") == 1
    assert value(metrics, "gateway_overhead_seconds_sum") == pytest.approx(2.0)


def test_two_registries_do_not_meet() -> None:
    one, two = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.settle(exchange())
    assert b'status="200"' in one.exposition()
    assert b'status="200"' not in two.exposition()
