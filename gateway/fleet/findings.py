"""Findings: one prober for all gateways that share a store.

One of them holds a lease and probes; what it finds goes into the store, and the others take it from there, as if they
had probed. Who has no fresh finding of an upstream probes it alone: while the store is away, where the leader does not
know that upstream, or while it is doubted here. What a gateway itself found gone it believes back only by its own
probes, for it may be the one whose way there is broken (`Prober.adopt`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from typing import TYPE_CHECKING, Final, get_args

import msgspec

from gateway.store.client import StoreAway, StoreError
from gateway.store.scripts import Script
from gateway.upstreams.upstream import Health, HealthStatus, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.store.client import Store
    from gateway.upstreams.health import Prober

_log = logging.getLogger("gateway.fleet")

LOOK_EVERY_S: Final = 0.5
#: a leader that is gone is followed by another after so long
LEASE_S: Final = 3.0
#: background work: a slow store is waited for
TIMEOUT_S: Final = 1.0
#: what nobody has probed for so long is of no use to anybody
FORGET_S: Final = 3600.0
_STATUSES: Final = frozenset(get_args(HealthStatus))

#: KEYS[1] the lease; ARGV: who asks, milliseconds. 1: it is theirs.
LEAD: Final = Script(
    "lead_probes",
    """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""",
)


class Finding(msgspec.Struct, frozen=True):
    """What a probe found. `at` (Unix time of the prober) and `by` tell one finding from another, and no more: clocks
    differ, so a finding's age is counted from when it was first seen.
    """

    at: float
    by: str
    status: str
    reason: str = ""
    latency_s: float | None = None
    gone: bool = False
    models: tuple[str, ...] = ()
    windows: dict[str, int] = {}
    slots: int | None = None
    loaded: tuple[str, ...] | None = None


_decode: Final = msgspec.json.Decoder(Finding).decode
_encode: Final = msgspec.json.Encoder().encode


class Findings:
    """Keeps `prober` and the store in step. `leads`: the probing is this gateway's."""

    def __init__(self, prober: Prober, upstreams: Callable[[], Iterable[Upstream]], store: Store) -> None:
        self._prober = prober
        self._upstreams = upstreams
        self._store = store
        self._me = secrets.token_hex(8)
        self._lease = store.key("prober")
        self._key = store.key("findings")
        self._seen: dict[str, tuple[float, str]] = {}
        self._untold: dict[str, Finding] = {}
        self._told: dict[str, str] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.leads = False

    def start(self) -> None:
        """Begin; needs the running loop, and the store started."""
        self._prober.on_finding = self._post
        self._task = asyncio.create_task(self._run(), name="findings")

    async def stop(self) -> None:
        """Stop, and let another lead at once."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self.leads:
            self.leads = False
            try:
                await self._store.call("DEL", self._lease, timeout_s=TIMEOUT_S)
            except (StoreAway, StoreError):
                return  # it ends by itself

    async def sync(self) -> None:
        """Lead or follow, once."""
        store = self._store
        try:
            lead = await store.run(LEAD, [self._lease], (self._me, int(LEASE_S * 1000)), timeout_s=TIMEOUT_S)
            begins, self.leads = bool(lead) and not self.leads, bool(lead)
            gone = self._forget()
            if self.leads:
                if begins:
                    told_by_others = await store.call("HKEYS", self._key, timeout_s=TIMEOUT_S)
                    here = {upstream.identity for upstream in self._upstreams()}
                    gone |= {identity.decode() for identity in told_by_others} - here
                if gone:
                    await store.call("HDEL", self._key, *gone, timeout_s=TIMEOUT_S)
                told, self._untold = self._untold, {}
                if told:
                    pairs = [part for identity, one in told.items() for part in (identity, _encode(one))]
                    await store.call("HSET", self._key, *pairs, timeout_s=TIMEOUT_S)
                    await store.call("EXPIRE", self._key, int(FORGET_S), timeout_s=TIMEOUT_S)
                return
            self._untold.clear()
            raw: dict[bytes, bytes] = await store.call("HGETALL", self._key, timeout_s=TIMEOUT_S)
            found = {identity.decode(): _decode(text) for identity, text in raw.items()}
        except StoreAway:
            self.leads = False  # each probes alone, as what it had from the leader grows old
            return
        except (StoreError, ValueError, msgspec.MsgspecError) as error:
            _log.error("%s cannot be used: %s", self._key, type(error).__name__)
            return
        self._adopt(found)

    def _forget(self) -> set[str]:
        """The upstreams that are no more, of which nothing is kept: a name may stand for other hosts every minute."""
        gone = (self._told.keys() | self._seen.keys()) - {upstream.identity for upstream in self._upstreams()}
        for identity in gone:
            for kept in (self._told, self._seen, self._untold):
                kept.pop(identity, None)
        return gone

    def _post(self, upstream: Upstream) -> None:
        """This gateway has probed: for the others, if it leads."""
        health = upstream.health
        self._untold[upstream.identity] = Finding(
            time.time(),
            self._me,
            health.status,
            health.reason,
            health.latency_s,
            health.gone,
            upstream.models,
            dict(upstream.windows),
            upstream.slots,
            tuple(upstream.loaded) if upstream.tells_loaded else None,
        )
        if self._told.get(upstream.identity) != health.status:  # that it is gone, or back, the others hear at once
            self._told[upstream.identity] = health.status
            self._news.set()

    def _adopt(self, found: dict[str, Finding]) -> None:
        for upstream in self._upstreams():
            one = found.get(upstream.identity)
            if one is None or self._seen.get(upstream.identity) == (one.at, one.by):
                continue
            first = upstream.identity not in self._seen
            self._seen[upstream.identity] = (one.at, one.by)
            if first or one.by == self._me or one.status not in _STATUSES:  # of what is first seen the age is not known
                continue
            health = Health(one.status, one.reason, one.latency_s, self._prober.now(), one.gone)  # type: ignore[arg-type]
            if self._prober.adopt(upstream, health) and health.status != "unreachable":
                upstream.models = one.models
                upstream.windows = one.windows
                upstream.slots = one.slots
                upstream.loaded = frozenset(one.loaded or ())
                upstream.tells_loaded = one.loaded is not None
            self._prober.tell(upstream)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            try:
                await self.sync()
            except Exception as error:
                _log.error("sharing what probes find failed: %s", type(error).__name__)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._news.wait()
