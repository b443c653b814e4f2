"""What is measured: each measure drives one contestant once and returns its figures."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from . import load, machine, open_loop


@dataclass(frozen=True)
class Bench:
    """What every run needs to know about the place: the cores, the mock's pids, whether to be quick."""

    cores: Sequence[int]
    mock: Sequence[int]
    quick: bool = False
    nice: int = 0


@dataclass(frozen=True)
class Target:
    """The contestant to drive: its port and its pids (none for `direct`: the mock counts as harness)."""

    port: int
    pids: Sequence[int]


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    label: str
    form: str = ",.0f"
    more_is_better: bool = True
    minus_direct: str = ""  # the figure is this one less direct's of the same round


METRICS: dict[str, Metric] = {
    "requests_per_s": Metric("requests/s, 64 connections"),
    "cpu_us_per_request": Metric("CPU µs per request", ",.1f", False),
    "added_p50_ms": Metric("added latency p50, ms", ".2f", False, "latency_p50_ms"),
    "added_p99_ms": Metric("added latency p99, ms", ".2f", False, "latency_p99_ms"),
    "cpu_us_per_event": Metric("CPU µs per event", ",.1f", False),
    "ttft_p50_ms": Metric("TTFT p50, ms", ".2f", False),
    "ttft_p99_ms": Metric("TTFT p99, ms", ".2f", False),
    "added_ttft_p50_ms": Metric("added TTFT p50, ms", ".2f", False, "ttft_p50_ms"),
    "ceiling_events_per_s": Metric("events/s, as fast as possible"),
    "ceiling_cpu_us_per_event": Metric("CPU µs per event at that rate", ",.2f", False),
    "ceiling_ttft_p99_ms": Metric("TTFT p99 at that rate, ms", ",.1f", False),
    "mb1_per_s": Metric("1 MB bodies/s"),
    "mb8_per_s": Metric("8 MB bodies/s", ",.1f"),
    "kb_per_stream": Metric("KB per open stream", ",.1f", False),
    "idle_rss_mb": Metric("RSS idle, MB", ",.1f", False),
    "start_s": Metric("start to first answer, s", ".2f", False),
}


def _run(module: str, job: load.Job | open_loop.Job, core: int, nice: int, limit_s: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(asdict(job))],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        preexec_fn=machine.pinned(core, nice),
        check=False,
    )
    if done.returncode:
        return {"errors": {"load_failed": 1}, "foreign_pct": 0.0, "window": {}, "stderr": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def closed(bench: Bench, target: Target, **fields: Any) -> dict[str, Any]:
    """One run of the closed-loop load generator with the given fields of its `Job`."""
    job = load.Job(target.port, bench.cores, target.pids, bench.mock, **fields)
    limit_s = job.duration_s + job.warm_s + job.ramp_s + 2 * job.grace_s + job.tokens * job.interval_ms / 1000 + 10
    return _run("tests.bench.load", job, bench.cores[1], bench.nice, limit_s)


def _per(window: Mapping[str, float], what: str) -> float:
    """CPU microseconds of the contestant per exchange or per event."""
    return 1e6 * window["contestant"] / window[what] if window.get(what) else 0.0


def requests(bench: Bench, target: Target) -> dict[str, Any]:
    """64 connections, closed loop, 1 KB prompts, unstreamed."""
    result = closed(bench, target, duration_s=1.0 if bench.quick else 4.0)
    if window := result["window"]:
        result["figures"] = {
            "requests_per_s": window["exchanges"] / window["s"],
            "cpu_us_per_request": _per(window, "exchanges"),
        }
    return result


def latency(bench: Bench, target: Target) -> dict[str, Any]:
    """100 requests/s over 8 connections, open loop, latency from the schedule."""
    job = open_loop.Job(target.port, bench.cores, target.pids, bench.mock, duration_s=1.5 if bench.quick else 4.0)
    result = _run("tests.bench.open_loop", job, bench.cores[1], bench.nice, job.duration_s + job.grace_s + 10)
    if spread := result.get("latency_ms"):
        result["figures"] = {"latency_p50_ms": spread["p50"], "latency_p99_ms": spread["p99"]}
    return result


def streams(bench: Bench, target: Target) -> dict[str, Any]:
    """50 streams of 100 events 20 ms apart."""
    tokens, each = (40, 1) if bench.quick else (100, 2)
    # 10.4 ms apart, so that their events fall evenly over the interval, as independent clients' do: events that
    # fall together are read in one turn of the proxy's loop, and look twice as cheap.
    result = closed(bench, target, connections=50, stream=True, tokens=tokens, interval_ms=20, each=each, ramp_s=0.52)
    if result["window"]:
        result["figures"] = {"cpu_us_per_event": _per(result["window"], "events")}
        if first := result["first_ms"]:
            result["figures"] |= {"ttft_p50_ms": first["p50"], "ttft_p99_ms": first["p99"]}
    return result


def ceiling(bench: Bench, target: Target) -> dict[str, Any]:
    """64 streams of 200 events, as fast as they go, one after the other."""
    result = closed(bench, target, stream=True, tokens=200, duration_s=1.0 if bench.quick else 3.0)
    if window := result["window"]:
        result["figures"] = {
            "ceiling_events_per_s": window["events"] / window["s"],
            "ceiling_cpu_us_per_event": _per(window, "events"),
        }
        if first := result["first_ms"]:
            result["figures"]["ceiling_ttft_p99_ms"] = first["p99"]
    return result


def _bodies(bench: Bench, target: Target, megabytes: int) -> dict[str, Any]:
    result = closed(
        bench,
        target,
        connections=4,
        prompt_bytes=megabytes * 1_000_000,
        duration_s=1.0 if bench.quick else 2.0,
        warm_s=0.3,
    )
    if window := result["window"]:
        result["figures"] = {f"mb{megabytes}_per_s": window["exchanges"] / window["s"]}
    return result


def bodies_1mb(bench: Bench, target: Target) -> dict[str, Any]:
    """1 MB prompts, 4 connections, closed loop, unstreamed."""
    return _bodies(bench, target, 1)


def bodies_8mb(bench: Bench, target: Target) -> dict[str, Any]:
    """8 MB prompts, 4 connections, closed loop, unstreamed."""
    return _bodies(bench, target, 8)


def memory(bench: Bench, target: Target) -> dict[str, Any]:
    """Streams that stay open, 400 ms between events, in a process just started and warmed by 20 requests."""
    connections, ramp_s = (200, 0.5) if bench.quick else (800, 1.5)
    tokens = 3 if bench.quick else 7
    result = closed(
        bench,
        target,
        connections=connections,
        stream=True,
        tokens=tokens,
        interval_ms=400,
        each=1,
        ramp_s=ramp_s,
        hold=True,
    )
    if result.get("open_streams") != connections:
        result["errors"]["not_all_open"] = connections - result.get("open_streams", 0)
    elif target.pids:
        grown = result["rss_open_bytes"] - result["rss_idle_bytes"]
        result["figures"] = {
            "kb_per_stream": grown / connections / 1024,
            "idle_rss_mb": result["rss_idle_bytes"] / 2**20,
        }
    return result


Measure: TypeAlias = Callable[[Bench, Target], dict[str, Any]]

MEASURES: dict[str, Measure] = {
    "requests": requests,
    "latency": latency,
    "streams": streams,
    "ceiling": ceiling,
    "bodies-1mb": bodies_1mb,
    "bodies-8mb": bodies_8mb,
    "memory": memory,
}
FRESH = frozenset({"memory"})  # need a process of their own, just started; its start is timed
