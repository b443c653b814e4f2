"""Where requests go and what they wait: policies on conversations, and what they lose without the engines' metrics."""

from __future__ import annotations

import random
from typing import Any

from tests.fleet.rig import words

from .stand import Clients, milliseconds, quantile, stand

_ENGINES = 4
#: a quarter of an H100's: about 4,400 prompt tokens a second
_SPEED = "0.25"


def conversations(seed: int, rate: float, seconds: float) -> list[tuple[float, dict[str, Any]]]:
    """Arrivals of turns: each conversation begins with the system prompt that all share, and grows with every turn."""
    dice = random.Random(seed)
    system = words(300, random.Random(0))
    talks: list[list[dict[str, str]]] = []
    arrivals, at = [], 0.0
    while at < seconds:
        at += dice.expovariate(rate)
        talk = dice.choice(talks) if talks and dice.random() < 0.75 else None
        if talk is None or len(talk) > 12:
            talk = [{"role": "system", "content": system}]
            talks.append(talk)
        else:
            talk.append({"role": "assistant", "content": words(60, dice)})
        talk.append({"role": "user", "content": words(dice.randint(200, 900), dice)})
        arrivals.append((at, {"model": "sim", "messages": list(talk), "stream": True, "max_tokens": 8}))
    return arrivals


async def _run(policy: str, seed: int, rate: float, seconds: float, metrics: bool) -> dict[str, Any]:
    settings = {"GATEWAY_POLICY": policy} if policy else {}
    async with stand(_ENGINES, "--speed", _SPEED, "--metrics-lag", "5", **settings) as here:
        if not metrics:
            await here.control("/faults", {"paths": ["/metrics"], "reset": True})
        clients = Clients(here)
        outcomes = await clients.at(conversations(seed, rate, seconds))
        clients.close()
        records = here.records().values()
        prompt = sum(one["prompt_tokens"] or 0 for one in records)
        cached = sum(one["cached_tokens"] or 0 for one in records)
        served = [sum(1 for one in records if one["upstream"].endswith(url.split("/")[2])) for url in here.urls]
        return {
            **milliseconds([one.head_s for one in outcomes if one.kind == "done"]),
            "failed": sum(one.kind != "done" for one in outcomes),
            "hit_rate": round(cached / max(prompt, 1), 3),
            "share_max_to_mean": round(max(served) * len(served) / max(sum(served), 1), 3),
        }


async def policies(rate: float = 5.0, seconds: float = 40.0, seed: int = 1) -> dict[str, Any]:
    """TTFT as clients see it, by policy; "" is the default."""
    names = ("", "round_robin", "least_inflight")
    found = {name or "default": await _run(name, seed, rate, seconds, True) for name in names}
    default, robin = found["default"], found["round_robin"]
    found["default_to_round_robin"] = {
        name: round(default[f"{name}_ms"] / robin[f"{name}_ms"], 3) for name in ("mean", "p90")
    }
    return found


async def without_metrics(rate: float = 5.0, seconds: float = 40.0, seed: int = 1) -> dict[str, Any]:
    """R3: the default policy with the engines' metrics within reach, and not."""
    found: dict[str, Any] = {
        "with metrics": await _run("", seed, rate, seconds, True),
        "without": await _run("", seed, rate, seconds, False),
    }
    found["p90_ratio"] = round(found["without"]["p90_ms"] / found["with metrics"]["p90_ms"], 3)
    return found


__all__ = ["conversations", "policies", "quantile", "without_metrics"]
