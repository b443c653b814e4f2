"""The prober: one task that keeps the health and the model list of every upstream fresh, and its breaker informed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Final

from gateway.upstreams.control import Control
from gateway.upstreams.upstream import Health, HealthStatus, Upstream

log = logging.getLogger(__name__)

#: an upstream that takes connections and answers no probe is ejected after so many in a row
UNANSWERED: Final = 2
#: and after so many, what still waits for its answer waits in vain
LOST: Final = 3
#: what another gateway found takes up to this to come here
FOLLOW_S: Final = 1.5
#: one that is silent under load is probed this often
HASTE_S: Final = 2.0
#: an upstream in doubt is probed at once, but no sooner than this after the probe before
DOUBT_S: Final = 0.2


class Prober:
    """Probes `upstreams()` again and again, in parallel; calls `on_change` when a status or a model list
    changed, `on_move` when a finding ejected an upstream or brought it back, and `on_lost` as long as nothing there
    answers, which the connections of a host without power or network never tell.

    `upstreams` is asked anew each time, so a reloaded set is picked up within `recheck_s`. An upstream that
    answers is probed every `interval_s`, one that does not every `recheck_s`, so that its return is seen
    soon; each wait is stretched or shortened by up to `jitter` of itself, so that many gateways do not
    knock together.
    """

    def __init__(
        self,
        control: Control,
        upstreams: Callable[[], Iterable[Upstream]],
        on_change: Callable[[Upstream], None],
        *,
        interval_s: float = 10.0,
        recheck_s: float = 1.0,
        jitter: float = 0.2,
        on_move: Callable[[Upstream], None] | None = None,
        on_lost: Callable[[Upstream], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if interval_s <= 0 or recheck_s <= 0:
            raise ValueError("interval_s and recheck_s must be above 0")
        self._control = control
        self._upstreams = upstreams
        self._on_change = on_change
        self._on_move = on_move
        self._on_lost = on_lost
        self._interval_s = interval_s
        self._recheck_s = min(recheck_s, interval_s)
        self._jitter = jitter
        self._clock = clock
        self._spread = spread
        self._next_at: dict[Upstream, float] = {}
        #: what was last told of each: others may probe in between, and their finding must be told too
        self._told: dict[Upstream, tuple[HealthStatus, tuple[str, ...]]] = {}
        self._unanswered: dict[Upstream, int] = {}
        #: in doubt, or found unreachable from here: what others find is no news of them
        self._unreached: set[Upstream] = set()
        #: told of each probe of ours, whatever it found
        self.on_finding: Callable[[Upstream], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self._probing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin probing in a task of its own; the first round runs at once."""
        if self._task is not None:
            raise RuntimeError("the prober runs already")
        self._task = asyncio.create_task(self._run(), name="prober")

    async def stop(self) -> None:
        """Stop; returns when nothing of it runs any more. Safe to call twice."""
        task, self._task = self._task, None
        if task is not None:
            ending = [task, *self._probing]
            for one in ending:
                one.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    def doubt(self, upstream: Upstream) -> None:
        """A request found it gone, or so it seems: probe it now."""
        self._unreached.add(upstream)  # another's finding may be from before
        soon = max(self._clock(), upstream.health.checked_at + DOUBT_S)
        if soon < self._next_at.get(upstream, 0.0):
            self._next_at[upstream] = soon
            self._doubt.set()

    def hasten(self, upstream: Upstream) -> None:
        """It says nothing though it has requests: probe it soon. A long prompt may be all there is to it."""
        now = self._clock()
        if now - upstream.health.checked_at >= HASTE_S and now < self._next_at.get(upstream, 0.0) < float("inf"):
            self._next_at[upstream] = now
            self._doubt.set()

    def now(self) -> float:
        return self._clock()

    def adopt(self, upstream: Upstream, health: Health) -> bool:
        """Take what another gateway's probe found for a finding of ours. False if it is not believed."""
        if upstream in self._unreached:
            return False
        upstream.health = health
        self._inform(upstream, health)
        # The other probes it again by then; if not, we do.
        self._next_at[upstream] = self._clock() + self._grace_s(health)
        return True

    def _grace_s(self, health: Health) -> float:
        every_s = self._recheck_s if health.status == "unreachable" else self._interval_s
        return 1.5 * every_s + FOLLOW_S

    def wake(self) -> None:
        """The set has changed: look for what is due now."""
        self._doubt.set()

    def due(self, now: float) -> list[Upstream]:
        """The upstreams whose time has come; forgets those that have left the set."""
        current = tuple(self._upstreams())
        self._next_at = {upstream: self._next_at.get(upstream, now) for upstream in current}
        self._unanswered = {one: count for one, count in self._unanswered.items() if one in self._next_at}
        self._unreached &= self._next_at.keys()
        self._told = {upstream: told for upstream, told in self._told.items() if upstream in self._next_at}
        return [upstream for upstream, at in self._next_at.items() if at <= now]

    async def probe_due(self) -> None:
        """Probe what is due, all at once, and wait for the findings."""
        await asyncio.gather(*(self._probe(upstream) for upstream in self.due(self._clock())))

    async def _run(self) -> None:
        while True:
            self._doubt.clear()
            for upstream in self.due(self._clock()):
                # A task for each: one host that says nothing must not hold up the news of all the others.
                self._next_at[upstream] = float("inf")
                task = asyncio.create_task(self._probe(upstream), name=f"probe of {upstream.name}")
                self._probing.add(task)
                task.add_done_callback(self._probed)
            # A short tick rather than a computed wake-up: a reload may bring upstreams that are due now.
            soonest_at = min(self._next_at.values(), default=float("inf"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, min(soonest_at - self._clock(), self._recheck_s))):
                    await self._doubt.wait()

    def _probed(self, task: asyncio.Task[None]) -> None:
        self._probing.discard(task)
        self._doubt.set()  # when it is due again is known only now

    async def _probe(self, upstream: Upstream) -> None:
        wait_s = self._interval_s
        try:
            health = await self._control.probe(upstream)
            if health.status == "unreachable":
                wait_s = self._recheck_s
                self._unreached.add(upstream)
            else:
                self._unreached.discard(upstream)
            self._inform(upstream, health)
            self.tell(upstream)
            if self.on_finding is not None:
                self.on_finding(upstream)
        except Exception:
            # One defect, here or in a listener, must not end the probing of the whole fleet.
            log.exception("probing %s failed", upstream.name)
        self._next_at[upstream] = self._clock() + wait_s * self._spread(1 - self._jitter, 1 + self._jitter)

    def _inform(self, upstream: Upstream, health: Health) -> None:
        """Tell the breaker what the probe found."""
        if health.status == "unreachable":
            unanswered = self._unanswered[upstream] = self._unanswered.get(upstream, 0) + 1
            moved = (health.gone or unanswered >= UNANSWERED) and upstream.breaker.found_gone(self._clock())
            if unanswered >= LOST and self._on_lost is not None:
                self._on_lost(upstream)
        else:
            self._unanswered.pop(upstream, None)
            moved = upstream.breaker.found_well(self._clock())
        if moved and self._on_move is not None:
            self._on_move(upstream)

    def tell(self, upstream: Upstream) -> None:
        """Pass on what is known of it, if that is news."""
        finding = (upstream.health.status, upstream.models)
        if self._told.get(upstream) != finding:
            self._told[upstream] = finding
            self._on_change(upstream)
