"""Hosts behind DNS names, against a real DNS server on loopback: found, followed, and kept while DNS is away."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import dns.rrset
import pytest

from gateway.catalog import Catalog, Host
from gateway.cli import _engines
from gateway.config import Config, Listen, Lookup
from gateway.fleet.names import Names
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Gateway, chat, gateway, provider, until

SOON_S = 10.0


class Dns(asyncio.DatagramProtocol):
    """Answers from `records`: (name, kind) -> records as a zone file has them. `mute`: answers nothing."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.ttl_s = 1
        self.mute = False
        self.asked: list[tuple[str, str]] = []
        self.listen = Listen("127.0.0.1", 0)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.listen = Listen(*transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, address: Any) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        kind = question.to_text().split()[-1]
        name = question.name.to_text().rstrip(".")
        self.asked.append((name, kind))
        if self.mute:
            return
        answer = dns.message.make_response(query)
        found = self.records.get((name, kind))
        if found:
            answer.answer.append(dns.rrset.from_text(question.name, self.ttl_s, "IN", kind, *found))
        elif not any(known == name for known, _ in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), address)


@pytest.fixture
async def server() -> AsyncIterator[Dns]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
    yield protocol
    transport.close()


@pytest.fixture
async def sims() -> AsyncIterator[tuple[SimServer, SimServer]]:
    """Two hosts that listen on the same port."""
    async with SimServer() as one, SimServer(host="127.0.0.2", port=int(one.url.rpartition(":")[2][:-3])) as two:
        yield one, two


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, with a certificate for the name `gpu.test`; a client's that trusts it)"""
    if shutil.which("openssl") is None:
        pytest.skip("its certificate is made with `openssl`")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", "/CN=test", "-addext", "subjectAltName=DNS:gpu.test",
         "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)
    return ours, ssl.create_default_context(cafile=certificate)


def port(sim: SimServer) -> int:
    return int(sim.url.rpartition(":")[2].removesuffix("/v1"))


def posts(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


@asynccontextmanager
async def following(server: Dns, kind: Any, base_url: str, **more: Any) -> AsyncIterator[Gateway]:
    named = provider("fleet", lookups=(Lookup(kind, base_url),), **more)
    async with gateway(named, dns_server=server.listen, dns_refresh_s=1.0) as here:
        yield here


def places(here: Gateway) -> list[str]:
    return [upstream.place for upstream in here.app.catalog.upstreams]


async def statuses(here: Gateway, count: int = 4) -> set[int]:
    return {(await here.ask("POST", CHAT, chat(max_tokens=1))).status for _ in range(count)}


async def test_every_address_of_a_name_is_a_host(server: Dns, sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    server.records = {("workers.test", "A"): ["127.0.0.2", "127.0.0.1"]}
    async with following(server, "host", f"http://workers.test:{port(one)}/v1") as here:
        assert places(here) == [f"127.0.0.1:{port(one)}", f"127.0.0.2:{port(one)}"]
        assert [upstream.name for upstream in here.app.catalog.upstreams] == [f"fleet@{one}" for one in places(here)]
        assert await statuses(here) == {200}
        assert posts(one)
        assert posts(two)
        hosts = {dict(request.headers)["Host"] for sim in sims for request in sim.requests}
        assert hosts == {f"workers.test:{port(one)}"}, "probes and prompts name it as it was configured"
        first = here.app.catalog.upstreams[0]

        server.records = {("workers.test", "A"): ["127.0.0.1"]}
        await until(lambda: len(places(here)) == 1, within_s=SOON_S, what="one host left")
        assert here.app.catalog.upstreams == (first,)
        before = len(posts(two))
        assert await statuses(here) == {200}
        assert len(posts(two)) == before


async def test_what_was_known_stays_while_names_cannot_be_looked_up(
    server: Dns, sims: tuple[SimServer, SimServer]
) -> None:
    one, _ = sims
    server.records = {("workers.test", "A"): ["127.0.0.1", "127.0.0.2"]}
    lookup = Lookup("host", f"http://workers.test:{port(one)}/v1")
    async with following(server, "host", lookup.base_url) as here:
        known = here.app.names.known[lookup]
        server.records = {}
        await until(lambda: known.failed, within_s=SOON_S, what="NXDOMAIN")
        assert "does not exist" in known.trouble
        server.records = {("workers.test", "TXT"): ['"x"']}
        await until(lambda: "no address" in known.trouble, within_s=SOON_S, what="no records")
        assert len(places(here)) == 2
        assert await statuses(here) == {200}
        ready = (await here.ask("GET", "/readyz")).json()
        assert ready["status"] == "degraded"
        assert f"dns+{lookup.base_url} cannot be looked up" in ready["reasons"][0]
        text = await here.scrape()
        assert f'gateway_name_hosts{{name="dns+{lookup.base_url}"}} 2.0' in text
        server.records = {("workers.test", "A"): ["127.0.0.2"]}
        await until(lambda: len(places(here)) == 1, within_s=SOON_S, what="it answers again")
        assert (await here.ask("GET", "/readyz")).json() == {"status": "ok"}


async def test_a_gateway_starts_without_dns_and_says_503_until_it_answers(
    server: Dns, sims: tuple[SimServer, SimServer]
) -> None:
    server.mute = True
    async with following(server, "host", f"http://workers.test:{port(sims[0])}/v1") as here:
        answer = await here.ask("POST", CHAT, chat())
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        server.records = {("workers.test", "A"): ["127.0.0.1"]}
        server.mute = False
        await until(lambda: places(here), within_s=SOON_S, what="the first answer")
        assert await statuses(here) == {200}


async def test_srv_records_bring_hosts_ports_and_weights(server: Dns) -> None:
    async with SimServer(models=("a", "b")) as one, SimServer(models=("a",)) as two, SimServer() as spare:
        records = [f"10 60 {port(one)} n1.test.", f"10 20 {port(two)} n2.test.", f"20 1 {port(spare)} n3.test."]
        server.records = {("_llm._tcp.test", "SRV"): records}
        for name in ("n1.test", "n2.test", "n3.test"):
            server.records[name, "A"] = ["127.0.0.1"]
        async with following(server, "srv", "http://_llm._tcp.test/v1", models=(), discover=True) as here:
            upstreams = here.app.catalog.upstreams
            assert [(one.netloc, one.weight) for one in upstreams] == [
                (f"n1.test:{port(one)}", 3),
                (f"n2.test:{port(two)}", 1),
            ], "the spare's priority is for when these are gone from DNS"
            assert list(here.app.catalog.table.pools) == ["a", "b"]
            server.records["_llm._tcp.test", "SRV"] = [f"20 1 {port(spare)} n3.test."]
            await until(lambda: list(here.app.catalog.table.pools) == ["sim"], within_s=SOON_S, what="the spare")
            assert await statuses(here) == {200}


async def test_a_ttl_brings_the_next_look_forward(server: Dns) -> None:
    """By the answer's own word; without one the longest time between two looks holds."""
    catalog = Catalog([provider("fleet", lookups=(Lookup("host", "http://workers.test:1/v1"),))])
    names = Names(catalog, lambda: None)
    server.records = {("workers.test", "A"): ["127.0.0.1"]}
    server.ttl_s = 3600
    await names.start(3600.0, server.listen)
    try:
        assert [one.place for one in catalog.upstreams] == ["127.0.0.1:1"]
        asked = len(server.asked)
        await asyncio.sleep(1.5)
        assert len(server.asked) == asked
        server.ttl_s = 0
        names.follow(3000.0, server.listen)  # another setting asks anew
        await until(lambda: len(server.asked) >= asked + 4, within_s=SOON_S, what="one more look, after a second")
    finally:
        await names.stop()


async def test_the_systems_resolver_is_asked_by_default(sims: tuple[SimServer, SimServer]) -> None:
    one, _ = sims
    async with gateway(provider("fleet", lookups=(Lookup("host", f"http://localhost:{port(one)}/v1"),))) as here:
        assert f"127.0.0.1:{port(one)}" in places(here)
        await until(lambda: any(one.health.status == "ok" for one in here.app.catalog.upstreams), what="a probe")
        assert await statuses(here) == {200}


async def test_a_certificate_is_checked_against_the_name_and_not_the_address(
    server: Dns, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    ours, trusting = tls
    async with SimServer(ssl=ours) as sim:
        at = sim.url.rpartition(":")[2]
        server.records = {("gpu.test", "A"): ["127.0.0.1"], ("other.test", "A"): ["127.0.0.1"]}
        for name, status in (("gpu.test", 200), ("other.test", 502)):
            named = provider("fleet", lookups=(Lookup("host", f"https://{name}:{at}"),))
            here = gateway(named, dns_server=server.listen)
            async with here as one:
                one.app.transport._tls = trusting
                answer = await one.ask("POST", CHAT, chat(max_tokens=1))
                assert answer.status == status, answer.body


async def test_reconcile_asks_the_engines_behind_names_too(server: Dns, sims: tuple[SimServer, SimServer]) -> None:
    one, _ = sims
    server.records = {("workers.test", "A"): ["127.0.0.1", "127.0.0.2"]}
    named = provider("fleet", lookups=(Lookup("host", f"http://workers.test:{port(one)}/v1"),))
    config = Config(data_dir=Path("/nonexistent"), providers=(named,), dns_server=server.listen)
    pages = await _engines(config)
    assert set(pages) == {f"fleet@127.0.0.{host}:{port(one)}" for host in (1, 2)}
    assert all(isinstance(page, str) and "vllm:" in page for page in pages.values())


def test_what_a_catalog_is_told_replaces_what_it_knew() -> None:
    lookup = Lookup("host", "http://w.test/v1")
    catalog = Catalog([provider("fleet", "http://fixed/v1", lookups=(lookup,))])
    catalog.found(lookup, (Host("http://w.test/v1", "10.0.0.1"), Host("http://w.test/v1", "::1")))
    fixed, first, second = catalog.upstreams
    assert [one.place for one in (fixed, first, second)] == ["fixed", "10.0.0.1:80", "[::1]:80"]
    catalog.found(lookup, (Host("http://w.test/v1", "::1"),))
    assert catalog.upstreams == (fixed, second)
    assert first.retired
    catalog.configure([provider("fleet", "http://fixed/v1", lookups=(lookup,), weight=2)])
    assert catalog.upstreams == (fixed, second), "a reload forgets nothing that was looked up"
    catalog.configure([provider("fleet", "http://fixed/v1")])
    assert catalog.upstreams == (fixed,)
