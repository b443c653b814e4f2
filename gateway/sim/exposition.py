"""vLLM's /metrics: the same names, labels and buckets, for the parts that the engine model has."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.sim.server import SimServer

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class Histogram:
    """Counts by upper bound (Prometheus `le`), in seconds."""

    __slots__ = ("_bounds", "_counts", "count", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.count += times
        self.total += value * times

    def lines(self, name: str, labels: str) -> list[str]:
        engine, model = labels.split(",", 1)
        below = 0
        lines = [f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{{engine},le="{bound}",{model}}} {float(below)}')
        return [*lines, f"{name}_count{{{labels}}} {float(self.count)}", f"{name}_sum{{{labels}}} {self.total}"]


def exposition(server: SimServer) -> str:
    """The page, in the Prometheus text format 0.0.4."""
    engine = server.engine
    model = server.models[0].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'engine="0",model_name="{model}"'
    gauges = {
        "num_requests_running": engine.running,
        "num_requests_waiting": engine.waiting,
        "kv_cache_usage_perc": engine.kv_usage,
    }
    counters = {
        "prefix_cache_queries": engine.prefix_cache_queries,
        "prefix_cache_hits": engine.prefix_cache_hits,
        "num_preemptions": engine.preemptions_total,
        "prompt_tokens": engine.prompt_tokens_total,
        "generation_tokens": engine.generation_tokens_total,
    }
    lines: list[str] = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} {float(value)}"]
    lines.append("# TYPE vllm:num_requests_waiting_by_reason gauge")
    for reason, value in (("capacity", engine.waiting), ("deferred", 0)):
        lines.append(f'vllm:num_requests_waiting_by_reason{{{labels},reason="{reason}"}} {float(value)}')
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name}_total counter", f"vllm:{name}_total{{{labels}}} {float(value)}"]
    lines.append("# TYPE vllm:request_success_total counter")
    # vLLM counts a tool call as "stop", and aborts here not at all (seen on 0.32.0)
    stops = server.finished["stop"] + server.finished["tool_calls"]
    for reason, value in (("stop", stops), ("length", server.finished["length"]), ("abort", 0), ("error", 0)):
        lines.append(
            f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{model}"}} {float(value)}'
        )
    lines += server.first_token_s.lines("vllm:time_to_first_token_seconds", labels)
    lines += server.inter_token_s.lines("vllm:inter_token_latency_seconds", labels)
    lines += server.request_s.lines("vllm:e2e_request_latency_seconds", labels)
    blocks = engine.pool.total
    lines += [
        "# TYPE vllm:cache_config_info gauge",
        (
            'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",'
            f'kv_cache_size_tokens="{blocks * 16}",num_gpu_blocks="{blocks}"}} 1.0'
        ),
    ]
    return "\n".join(lines) + "\n"
