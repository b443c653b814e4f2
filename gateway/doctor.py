"""`llm-gateway doctor`: what is wrong with this machine and with the store, and what to do about it.

Each check gives findings; none stops the others. Nothing is changed but a probe key that expires, and, where the
embedded store is configured and no gateway runs it, the store is started for the length of the visit.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gateway.config import Config
from gateway.oidc.issuer import Issuer
from gateway.oidc.signers import Signers
from gateway.store.client import REQUEST_TIMEOUT_S, Store
from gateway.store.visit import Refused, Visit
from gateway.upstreams.control import Control

#: a stream takes two, a client that keeps its connection one
MIN_OPEN_FILES: Final = 4096
MAX_CLOCK_S: Final = 1.0
PINGS: Final = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` of the check, what was `found`, and, unless it is ok, the `advice`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


async def examine(config: Config) -> list[Finding]:
    """Every finding, the machine's first."""
    found = [*_data_directory(config.data_dir), _open_files(), _aiohttp(), _event_loop()]
    if (issuer := Issuer.configured(config)) is not None:
        found.append(await _issuer(issuer))
    store = Store.open(config.store, config.redis_url.value, config.data_dir)
    if store is None:
        if config.store == "off":
            return [*found, Finding("store", "ok", "off: limits, keys and usage are each process's own")]
        return [*found, Finding("store", "warn", "no embedded store for this platform", "set REDIS_URL")]
    async with _visit(store) as visit:
        found += [one async for one in _store(store, visit)]
    return found


async def _issuer(issuer: Issuer) -> Finding:
    """Whether tokens could be verified now."""
    name = "token issuer"
    async with Control() as control:
        signers = Signers(control.fetch, issuer)
        await signers.look()
    if signers.trouble:
        return Finding(
            name, "fail", signers.trouble, "look at GATEWAY_OIDC_ISSUER: to the letter as in the tokens' iss"
        )
    usable = sum(any(one.fits(None, alg) for alg in issuer.algorithms) for one in signers.all)
    found = f"{usable} of the {len(signers.all)} keys of {issuer.url} are for {', '.join(issuer.algorithms)}"
    if not usable:
        return Finding(name, "fail", found, "name its algorithms in GATEWAY_OIDC_ALGORITHMS")
    return Finding(name, "ok", found)


@asynccontextmanager
async def _visit(store: Store) -> AsyncIterator[Visit]:
    await store.start()
    visit = Visit(store.address)
    try:
        yield visit
    finally:
        await visit.close()
        await store.close()


# -- the machine ------------------------------------------------------------------------------------------------


def _data_directory(path: Path) -> Iterator[Finding]:
    name = "data directory"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        yield Finding(name, "ok", f"{path} is not there yet: the first start makes it")
        return
    except OSError as error:
        yield Finding(name, "fail", f"{path}: {error.strerror}", "choose another with GATEWAY_DATA_DIR")
        return
    if not path.is_dir() or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(name, "fail", f"{path} cannot be written", "give it to the user that runs the gateway")
    elif mode & 0o077:
        yield Finding(name, "warn", f"{path} is open to others (mode {mode & 0o777:04o})", f"chmod 700 {path}")
    else:
        yield Finding(name, "ok", f"{path}, mode {mode & 0o777:04o}")


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        advice = f"ulimit -n {MIN_OPEN_FILES}, or LimitNOFILE= in the unit: a stream takes two"
        return Finding("open files", "warn", f"at most {soft}", advice)
    return Finding("open files", "ok", f"at most {soft}" if soft != resource.RLIM_INFINITY else "no limit")


def _aiohttp() -> Finding:
    import aiohttp

    from gateway.server import require_aiohttp

    try:
        require_aiohttp()
    except RuntimeError as error:
        return Finding("aiohttp", "fail", str(error), "install from requirements.lock")
    return Finding("aiohttp", "ok", f"{aiohttp.__version__}, with its C parser")


def _event_loop() -> Finding:
    if importlib.util.find_spec("uvloop") is None:
        return Finding("event loop", "warn", "asyncio's own", "install uvloop: it serves more on one core")
    return Finding("event loop", "ok", f"uvloop {importlib.metadata.version('uvloop')}")


# -- the store --------------------------------------------------------------------------------------------------


async def _store(store: Store, visit: Visit) -> AsyncIterator[Finding]:
    try:
        info = await visit.info()
    except Refused as refused:
        advice = "is it running, and is the password right? The gateway serves meanwhile, with limits of its own"
        yield Finding("store", "fail", f"{store.address}: {refused}", advice)
        return
    yield _version(store, info)
    yield await _shape(store, visit, info)
    yield await _writes(store, visit)
    yield await _latency(store, visit)
    yield await _persistence(visit, info)
    yield _eviction(info)


def _version(store: Store, info: dict[str, Any]) -> Finding:
    flavour = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info.get("redis_version", "?"))
    found = f"{flavour} {version} at {store.address}"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (6, 2):
        return Finding("store", "warn", found, "6.2 is the oldest that makes sense, 7 the oldest that is tested")
    return Finding("store", "ok", found)


async def _shape(store: Store, visit: Visit, info: dict[str, Any]) -> Finding:
    name = "store shape"
    mode, role = info.get("redis_mode", "standalone"), info.get("role", "master")
    if mode == "cluster":
        try:
            state = await visit.cluster()
        except Refused as refused:
            return Finding(name, "warn", f"a cluster that does not tell its state ({refused})", "allow CLUSTER INFO")
        found = f"cluster of {state.get('cluster_size', '?')} primaries, {state.get('cluster_state')}"
        if store.address.shape != "cluster":
            return Finding(name, "fail", found, "begin the URL with redis+cluster://")
        if state.get("cluster_state") != "ok":
            return Finding(name, "fail", found, "look at CLUSTER NODES")
        return Finding(name, "ok", f"{found}; all keys are in one slot, on one node")
    if role != "master":
        return Finding(name, "fail", "a replica: it takes no writes", "name the primary, or use redis+sentinel://")
    replicas = f"{info.get('connected_slaves', 0)} replicas"
    if store.address.shape == "sentinel":
        return Finding(name, "ok", f"primary {store.address.master!r} by Sentinel, {replicas}")
    return Finding(name, "ok", f"one server, {replicas}")


async def _writes(store: Store, visit: Visit) -> Finding:
    """Writes and scripts are allowed, and both clocks agree: limits and budgets go by the store's."""
    name = "store writes"
    try:
        await visit.ask("SET", store.key("doctor"), "1", "PX", 1000)
        began = time.time()
        seconds, micros = await visit.ask("EVAL", "return redis.call('TIME')", 1, store.key("doctor"))
        off_s = int(seconds) + int(micros) / 1e6 - (began + time.time()) / 2
    except Refused as refused:
        return Finding(name, "fail", str(refused), "the gateway needs to write and to run scripts (ACL: +@all ~*)")
    if abs(off_s) > MAX_CLOCK_S:
        return Finding(name, "warn", f"its clock is {off_s:+.1f} s from this one", "run NTP on both machines")
    return Finding(name, "ok", f"writes and scripts; its clock is {off_s:+.3f} s from this one")


async def _latency(store: Store, visit: Visit) -> Finding:
    took = []
    try:
        for _ in range(PINGS):
            began_at = time.monotonic()
            await visit.ask("GET", store.key("doctor"))  # of a key: on a Cluster, PING goes to another node
            took.append(time.monotonic() - began_at)
    except Refused as refused:
        return Finding("store latency", "fail", str(refused), "is the network between them whole?")
    took.sort()
    p50, p99 = took[PINGS // 2], took[PINGS * 99 // 100]
    found = f"p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms"
    if p99 > REQUEST_TIMEOUT_S:
        advice = f"requests wait {REQUEST_TIMEOUT_S * 1000:g} ms at most: put the store nearer"
        return Finding("store latency", "fail" if p50 > REQUEST_TIMEOUT_S else "warn", found, advice)
    return Finding("store latency", "ok", found)


async def _persistence(visit: Visit, info: dict[str, Any]) -> Finding:
    name = "store persistence"
    aof = bool(info.get("aof_enabled"))
    if aof and info.get("aof_last_write_status", "ok") != "ok":
        return Finding(name, "fail", "its append-only file cannot be written", "is its disk full?")
    try:
        saves = (await visit.config("save")).strip()
        rdb = f"snapshots ({saves})" if saves else "no snapshots"
    except Refused:
        saves, rdb = "?", "snapshots unknown: CONFIG GET is not allowed"
    if aof:
        return Finding(name, "ok", f"append-only file, {rdb}")
    advice = "set appendonly yes: what was used since the last snapshot is lost when it dies"
    if saves:
        return Finding(name, "warn", f"no append-only file, {rdb}", advice)
    return Finding(name, "warn", "none: limits, keys and usage are lost when it stops", "set appendonly yes")


def _eviction(info: dict[str, Any]) -> Finding:
    policy = info.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        advice = "set maxmemory-policy noeviction: else keys and usage are dropped when memory is short"
        return Finding("store eviction", "warn", str(policy), advice)
    return Finding("store eviction", "ok", "noeviction")


def text(findings: list[Finding]) -> str:
    """An aligned table; below each finding that is not ok, what to do."""
    width = max(len(one.name) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{one.status:<4}  {one.name:<{width}}  {one.found}")
        if one.advice:
            lines.append(f"{'':<4}  {'':<{width}}  -> {one.advice}")
    return "\n".join(lines)


def run(config: Config) -> list[Finding]:
    """`examine` on a loop of its own."""
    return asyncio.run(examine(config))
