"""One prober for all gateways that share a store: who probes, what the others know, and what they do without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gateway.fleet.findings import LEASE_S, Findings
from gateway.runtimes import RUNTIMES
from gateway.sim import SimServer
from gateway.store.address import parse
from gateway.store.client import Store
from gateway.upstreams.control import Control
from gateway.upstreams.health import Prober
from gateway.upstreams.upstream import Upstream
from tests.journeys.stage import until
from tests.store_fixtures import Server

INTERVAL_S = 0.4


class Gateway:
    """What a gateway knows of one upstream."""

    def __init__(self, upstream: Upstream, prober: Prober, findings: Findings, stop: Callable[[], Awaitable[None]]):
        self.upstream = upstream
        self.prober = prober
        self.findings = findings
        self.stop = stop


@asynccontextmanager
async def gateway(store_url: str, url: str) -> AsyncIterator[Gateway]:
    upstream = Upstream("one", "one", RUNTIMES["vllm"], url)
    store = Store(parse(store_url))
    async with Control(timeout_s=0.5) as control:
        prober = Prober(control, lambda: [upstream], lambda _: None, interval_s=INTERVAL_S, recheck_s=INTERVAL_S)
        findings = Findings(prober, lambda: [upstream], store)
        await store.start()
        await prober.probe_due()
        prober.start()
        findings.start()
        stopped = False

        async def stop() -> None:
            nonlocal stopped
            if not stopped:
                stopped = True
                await findings.stop()
                await prober.stop()

        try:
            yield Gateway(upstream, prober, findings, stop)
        finally:
            await stop()
            await store.close()


def probes(sim: SimServer) -> int:
    return sum(one.target == "/health" for one in sim.requests)


async def rate(sim: SimServer, seconds: float = 4.0) -> float:
    """Probes a second."""
    before = probes(sim)
    await asyncio.sleep(seconds)
    return (probes(sim) - before) / seconds


async def led(*gateways: Gateway) -> Gateway:
    """The one that leads, once there is one and the others have heard of it."""
    await until(lambda: sum(one.findings.leads for one in gateways) == 1, what="a leader")
    await asyncio.sleep(1.5)
    return next(one for one in gateways if one.findings.leads)


async def test_one_probes_and_all_know(store_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(store_server.url, sim.url) as a,
        gateway(store_server.url, sim.url) as b,
        gateway(store_server.url, sim.url) as c,
    ):
        leader = await led(a, b, c)
        checked = [one.upstream.health.checked_at for one in (a, b, c)]
        assert await rate(sim) < 2.2 / INTERVAL_S, "three would probe three times as often"
        for one, before in zip((a, b, c), checked, strict=True):
            assert one.upstream.health.status == "ok"
            assert one.upstream.health.checked_at > before
            assert one.upstream.models == ("sim",)
        await leader.stop()
        others = [one for one in (a, b, c) if one is not leader]
        await until(lambda: any(one.findings.leads for one in others), within_s=LEASE_S / 2, what="a new leader")
        await asyncio.sleep(1.5)
        assert 0.3 / INTERVAL_S < await rate(sim) < 1.8 / INTERVAL_S, "two would probe twice as often"


async def test_all_know_of_a_death_and_of_a_return(valkey_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(valkey_server.url, sim.url) as a,
        gateway(valkey_server.url, sim.url) as b,
    ):
        await led(a, b)
        sim.kill()
        for one in (a, b):
            await until(lambda one=one: one.upstream.breaker.state == "open", 3.0, "ejected")
        await sim.revive()
        for one in (a, b):
            await until(lambda one=one: one.upstream.breaker.state == "closed", 3.0, "back")


async def test_without_a_store_each_probes_alone(valkey_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(valkey_server.url, sim.url) as a,
        gateway(valkey_server.url, sim.url) as b,
    ):
        await led(a, b)
        valkey_server.pause()
        try:
            await until(lambda: not a.findings.leads and not b.findings.leads, what="nobody leads")
            await asyncio.sleep(3.0)  # what came from the leader grows old
            assert await rate(sim) > 1.4 / INTERVAL_S
            assert {a.upstream.health.status, b.upstream.health.status} == {"ok"}
        finally:
            valkey_server.resume()


async def test_what_a_gateway_found_gone_itself_it_believes_back_only_by_itself(valkey_server: Server) -> None:
    """The way there may be broken from here only."""
    async with SimServer() as sim, gateway(valkey_server.url, sim.url) as a, gateway(valkey_server.url, sim.url) as b:
        leader = await led(a, b)
        follower = b if leader is a else a
        port, follower.upstream.netloc = follower.upstream.netloc, "127.0.0.1:1"  # from here nobody is there
        follower.prober.doubt(follower.upstream)
        await until(lambda: follower.upstream.breaker.state == "open", what="ejected there")
        await asyncio.sleep(3.0)
        assert follower.upstream.health.status == "unreachable"
        assert follower.upstream.breaker.state == "open"
        assert leader.upstream.breaker.state == "closed"
        follower.upstream.netloc = port
        await until(lambda: follower.upstream.breaker.state == "closed", what="back")


async def test_nothing_is_kept_of_hosts_that_are_no_more(store: Store) -> None:
    """A name may stand for other hosts every minute, for months."""
    hosts = [Upstream(f"host-{number}", "one", RUNTIMES["vllm"], f"http://127.0.0.1:{number}") for number in (1, 2, 3)]
    async with Control(timeout_s=0.5) as control:
        prober = Prober(control, lambda: hosts, lambda _: None)
        first = Findings(prober, lambda: hosts, store)
        for host in hosts:
            first._post(host)
        await first.sync()
        key = store.key("findings")
        assert await store.call("HLEN", key) == 3
        hosts.pop()
        await first.sync()
        assert await store.call("HLEN", key) == 2
        assert set(first._told) == {host.identity for host in hosts}
        await store.call("DEL", store.key("prober"))  # it is gone, and another leads
        hosts.pop()
        second = Findings(prober, lambda: hosts, store)
        await second.sync()
        assert second.leads
        assert await store.call("HKEYS", key) == [hosts[0].identity.encode()]
