"""Many runs: policies, seeds, rates and sizes of the fleet, and the figures that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

from gateway.routing.policies import DEFAULT, POLICIES
from gateway.sim.replay.fleet import Hardware, Run, run
from gateway.sim.replay.loads import Arrival, faster

#: of the load's own rate: where the sweep looks
SWEEP: Final = (0.3, 0.6, 0.9, 1.2, 1.6, 2.2)
#: the knee is where the p90 of the time to the first token passes this many times what an idle, empty engine needs
KNEE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Fleet:
    engines: int = 8
    hardware: Hardware = field(default_factory=Hardware)
    speeds: tuple[float, ...] = ()
    index_tokens: int | None = None
    feedback: bool = True

    def play(self, arrivals: Sequence[Arrival], policy: str) -> Run:
        return run(
            arrivals,
            POLICIES[policy],
            self.engines,
            self.hardware,
            speeds=self.speeds,
            index_tokens=self.index_tokens,
            feedback=self.feedback,
        )


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of sorted values; 0.0 of none."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def figures(one: Run) -> dict[str, Any]:
    """One run in numbers. Times in seconds; shares of requests between the engines, of tokens in the caches."""
    ordered = sorted(one.ttft_s)
    return {
        "requests": len(ordered),
        "refused": one.refused,
        "ttft_mean_s": fmean(ordered) if ordered else 0.0,
        "ttft_p50_s": quantile(ordered, 0.5),
        "ttft_p90_s": quantile(ordered, 0.9),
        "ttft_p99_s": quantile(ordered, 0.99),
        "ttft_predicted_mean_s": fmean(one.predicted_s) if one.predicted_s else None,
        "hit_rate": one.cached_tokens / one.prompt_tokens if one.prompt_tokens else 0.0,
        "hit_rate_believed": one.believed_tokens / one.prompt_tokens if one.prompt_tokens else 0.0,
        "share_max_over_mean": max(one.shares) / fmean(one.shares) if any(one.shares) else 1.0,
    }


def mean(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same figures, each the mean over the runs of several seeds."""
    averaged: dict[str, Any] = {}
    for name, value in several[0].items():
        if value is None:
            averaged[name] = None
        else:
            averaged[name] = round(fmean(one[name] for one in several), 6)
    averaged["requests"], averaged["refused"] = several[0]["requests"], max(one["refused"] for one in several)
    return averaged


def rate_of(arrivals: Sequence[Arrival]) -> float:
    """Requests a second."""
    span_s = arrivals[-1].at - arrivals[0].at
    return len(arrivals) / span_s if span_s > 0 else float(len(arrivals))


def knee_limit_s(arrivals: Sequence[Arrival], hardware: Hardware) -> float:
    """The p90 of the time to the first token that counts as past the knee."""
    tokens = quantile(sorted(float(one.prompt.tokens) for one in arrivals), 0.9)
    return KNEE * (tokens / hardware.rate + hardware.decode_s)


def sweep(
    arrivals: Sequence[Arrival], fleet: Fleet, policy: str, factors: Sequence[float], limit_s: float
) -> tuple[list[dict[str, float]], float]:
    """The p90 at each rate, and the knee: the rate at which the p90 passes `limit_s`, between two that were tried by
    straight line; the last one tried where it never does, 0.0 where it always does.
    """
    own = rate_of(arrivals)
    points: list[dict[str, float]] = []
    knee = 0.0
    for factor in factors:
        seen = figures(fleet.play(faster(arrivals, factor), policy))
        point = {
            "rate": round(own * factor, 4),
            "ttft_mean_s": round(seen["ttft_mean_s"], 6),
            "ttft_p90_s": round(seen["ttft_p90_s"], 6),
        }
        points.append(point)
        if point["ttft_p90_s"] <= limit_s:
            knee = point["rate"]
            continue
        if len(points) > 1:
            before = points[-2]
            rise = point["ttft_p90_s"] - before["ttft_p90_s"]
            knee += (point["rate"] - before["rate"]) * (limit_s - before["ttft_p90_s"]) / rise
        break  # beyond it there is only more of the same, and it takes the longest
    return points, round(knee, 4)


def compare(
    loads: Sequence[Sequence[Arrival]],
    fleet: Fleet,
    policies: Sequence[str],
    *,
    factors: Sequence[float] = SWEEP,
    sweep_requests: int = 1500,
    limit_s: float | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each policy, one after the other; `loads` is the load once for each seed."""
    limit_s = limit_s or knee_limit_s(loads[0], fleet.hardware)
    for policy in policies:
        found = mean([figures(fleet.play(arrivals, policy)) for arrivals in loads])
        if policy == DEFAULT:
            found["default"] = True
        if factors:
            found["sweep"], found["knee_rate"] = sweep(loads[0][:sweep_requests], fleet, policy, factors, limit_s)
            found["knee_p90_s"] = round(limit_s, 4)
        yield policy, found


def engines_needed(
    p90_s: Callable[[int], float], target_s: float, sizes: Sequence[int]
) -> tuple[dict[int, float], int | None]:
    """The p90 for each size of the fleet, smallest first, up to the first that keeps `target_s`: that one, if any."""
    seen: dict[int, float] = {}
    for size in sorted(sizes):
        seen[size] = p90_s(size)
        if seen[size] <= target_s:
            return seen, size
    return seen, None
