"""The prober: when it knocks, what it reports, and that it ends."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import cast

import pytest

from gateway.runtimes import RUNTIMES
from gateway.upstreams.control import Control
from gateway.upstreams.health import Prober
from gateway.upstreams.upstream import Health, HealthStatus, Upstream
from tests.replay import Faults, Replay, load

VLLM = {("GET", "/health"): load("vllm/01-health"), ("GET", "/v1/models"): load("vllm/02-models")}


def upstream(name: str, url: str = "http://127.0.0.1:9") -> Upstream:
    return Upstream(name, "up", RUNTIMES["vllm"], url + "/v1")


@dataclass
class Findings:
    """Stands in for Control where the schedule is tested: the finding is given, no socket is needed."""

    status: dict[str, HealthStatus] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)

    async def probe(self, upstream: Upstream) -> Health:
        self.probed.append(upstream.name)
        upstream.health = Health(self.status.get(upstream.name, "ok"))
        return upstream.health


class Scene:
    """A prober with a clock moved by hand."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.upstreams = [upstream(name) for name in names]
        self.findings = Findings()
        self.changes: list[str] = []
        self.prober = Prober(
            cast(Control, self.findings),
            lambda: self.upstreams,
            lambda changed: self.changes.append(f"{changed.name} {changed.health.status}"),
            clock=lambda: self.now,
            spread=lambda low, high: (low + high) / 2,
        )

    async def probed_at(self, now: float) -> list[str]:
        self.now = now
        self.findings.probed.clear()
        await self.prober.probe_due()
        return list(self.findings.probed)


async def test_all_at_once_then_at_the_interval() -> None:
    scene = Scene("a", "b")
    assert await scene.probed_at(0) == ["a", "b"]
    assert await scene.probed_at(9.9) == []
    assert await scene.probed_at(10) == ["a", "b"]


async def test_an_unreachable_one_is_asked_again_soon() -> None:
    scene = Scene("a", "b")
    scene.findings.status["b"] = "unreachable"
    await scene.probed_at(0)
    assert await scene.probed_at(1) == ["b"]
    scene.findings.status["b"] = "ok"
    assert await scene.probed_at(2) == ["b"]
    assert await scene.probed_at(3) == []
    assert await scene.probed_at(12) == ["a", "b"]


async def test_changes_are_told_once() -> None:
    scene = Scene("a")
    await scene.probed_at(0)
    await scene.probed_at(10)
    scene.findings.status["a"] = "degraded"
    await scene.probed_at(20)
    await scene.probed_at(30)
    assert scene.changes == ["a ok", "a degraded"]


async def test_what_another_probe_found_is_told_too() -> None:
    """A look at the providers page probes as well; the prober must still tell what that one found first."""
    scene = Scene("a")
    await scene.probed_at(0)
    scene.upstreams[0].models = ("new",)
    scene.upstreams[0].health = Health("ok")
    await scene.probed_at(10)
    assert scene.changes == ["a ok", "a ok"]


async def test_a_changed_set_is_picked_up() -> None:
    scene = Scene("a")
    await scene.probed_at(0)
    scene.upstreams = [upstream("b")]
    assert await scene.probed_at(1) == ["b"]
    assert scene.prober.due(100) == scene.upstreams


async def test_an_upstream_that_left_during_its_probe_is_forgotten() -> None:
    scene = Scene("a")
    await scene.probed_at(0)
    scene.upstreams = []
    assert scene.prober.due(100) == []


async def test_jitter_spreads_the_waits() -> None:
    scene = Scene(*(f"u{n}" for n in range(50)))
    prober = Prober(cast(Control, scene.findings), lambda: scene.upstreams, lambda _: None, clock=lambda: 0.0)
    await prober.probe_due()
    waits = list(prober._next_at.values())
    assert all(8 <= wait <= 12 for wait in waits)
    assert max(waits) - min(waits) > 1


async def test_a_defect_of_the_listener_does_not_end_the_probing(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("a")

    def broken(_: Upstream) -> None:
        raise ZeroDivisionError

    prober = Prober(cast(Control, scene.findings), lambda: scene.upstreams, broken, clock=lambda: scene.now)
    with caplog.at_level(logging.ERROR):
        await prober.probe_due()
    assert "probing a failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    scene.now = 20
    await prober.probe_due()
    assert scene.findings.probed == ["a", "a"]


async def test_over_a_socket_models_and_status_changes_are_told() -> None:
    changed: asyncio.Queue[tuple[HealthStatus, tuple[str, ...]]] = asyncio.Queue()
    async with Control() as control:
        async with Replay(VLLM) as replay:
            up = upstream("a", replay.url)
            prober = Prober(
                control,
                lambda: [up],
                lambda up: changed.put_nowait((up.health.status, up.models)),
                interval_s=0.05,
            )
            prober.start()
            assert await asyncio.wait_for(changed.get(), 1) == ("ok", ("smol",))
            replay.faults = Faults(hang_up=True)
            assert await asyncio.wait_for(changed.get(), 1) == ("unreachable", ("smol",))
            replay.faults = Faults()
            assert await asyncio.wait_for(changed.get(), 1) == ("ok", ("smol",))
        await prober.stop()


async def test_stop_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with Replay(VLLM, Faults(silent=True)) as replay, Control() as control:
        up = upstream("a", replay.url)
        prober = Prober(control, lambda: [up], lambda _: None)
        prober.start()
        assert "prober" in {task.get_name() for task in asyncio.all_tasks()}
        with pytest.raises(RuntimeError, match="runs already"):
            prober.start()
        await asyncio.sleep(0.05)
        await prober.stop()
        await prober.stop()
    assert asyncio.all_tasks() == before


def test_intervals_must_make_sense() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Prober(cast(Control, Findings()), list, lambda _: None, interval_s=0)


async def test_what_is_in_doubt_here_is_believed_well_only_by_a_probe_of_ours() -> None:
    """Another gateway's finding may be from before the death that a request has just met."""
    scene = Scene("one")
    await scene.probed_at(0.0)
    (one,) = scene.upstreams
    one.breaker.failed(1.0, 5, gone=True)
    scene.now = 1.0
    scene.prober.doubt(one)
    assert not scene.prober.adopt(one, Health("ok", "", 0.001, 1.0))
    assert one.breaker.state == "open"
    assert await scene.probed_at(1.3) == ["one"]
    assert one.breaker.state == "closed"
    assert scene.prober.adopt(one, Health("unreachable", "refused", None, 2.0, gone=True))
    assert one.breaker.state == "open"


async def test_what_another_probes_is_not_probed_here_until_its_news_stay_away() -> None:
    scene = Scene("one")
    await scene.probed_at(0.0)
    (one,) = scene.upstreams
    for second in (5.0, 15.0, 25.0):
        scene.now = second
        assert scene.prober.adopt(one, Health("ok", "", 0.001, second))
        assert await scene.probed_at(second + 9.0) == []
    assert await scene.probed_at(25.0 + 15.0 + 1.6) == ["one"]


async def test_a_silent_one_is_probed_sooner_and_not_all_the_time() -> None:
    scene = Scene("one")
    await scene.probed_at(0.0)
    (one,) = scene.upstreams
    one.health = Health("ok", "", 0.001, 0.0)
    probed = []
    for tenth in range(1, 51):
        scene.now = tenth / 10
        scene.prober.hasten(one)
        if await scene.probed_at(scene.now):
            probed.append(scene.now)
            one.health = Health("ok", "", 0.001, scene.now)
    assert probed == [2.0, 4.0]
