"""Sentinel, Cluster, TCP with a password and a failover: real servers on free ports of this machine."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from gateway.store.address import parse
from gateway.store.client import Store, StoreAway
from gateway.store.scripts import Script
from tests.store_fixtures import program

BOTH = Script(
    "both", "redis.call('SET', KEYS[1], ARGV[1]) redis.call('INCR', KEYS[2]) return redis.call('GET', KEYS[1])"
)
KINDS = pytest.mark.parametrize("kind", ["valkey", "redis"])


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def ask(port: int, *words: str) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536)
    except OSError:
        return b""


def wait(port: int, good: bytes, *words: str) -> None:
    deadline_at = time.monotonic() + 10.0
    while good not in ask(port, *words):
        assert time.monotonic() < deadline_at, (words, ask(port, *words))
        time.sleep(0.02)


@contextmanager
def started(
    kind: str, *servers: tuple[int, tuple[str, ...], tuple[str, ...]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Servers on loopback ports: (port, configuration lines, arguments)."""
    binary = program(kind)
    running = []
    with tempfile.TemporaryDirectory(prefix="store-") as top:
        try:
            for port, lines, arguments in servers:
                folder = Path(top, str(port))
                folder.mkdir()
                common = ("bind 127.0.0.1", f"port {port}", f"dir {folder}", 'save ""', *lines)
                (folder / "conf").write_text("\n".join(common) + "\n")
                command = [binary, folder / "conf", *arguments]
                running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            for port, lines, _ in servers:
                wait(port, b"-NOAUTH" if any("requirepass" in line for line in lines) else b"+PONG", "PING")
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = Store(parse(url))
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def works(store: Store, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while True:
            try:
                answer = await store.run(BOTH, [store.key("a"), store.key("b")], ["1"], timeout_s=0.25)
                assert answer == b"1"
                return
            except StoreAway:
                await asyncio.sleep(0.05)


@KINDS
async def test_tcp_with_a_password(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    with started(kind, (port, ("requirepass canary",), ())):
        async with opened(f"redis://:canary@127.0.0.1:{port}/3") as store:
            assert store.up
            await works(store, 2.0)
        async with opened(f"redis://:canary2@127.0.0.1:{port}") as wrong:
            assert not wrong.up
            assert "(unusable)" in wrong.trouble
    assert "canary" not in caplog.text


@KINDS
async def test_cluster(kind: str) -> None:
    ports = free_ports(2)
    lines = ("cluster-enabled yes", "cluster-port {}", "cluster-node-timeout 1000")
    spare = free_ports(2)
    servers = [(p, (lines[0], lines[1].format(q), lines[2]), ()) for p, q in zip(ports, spare, strict=True)]
    with started(kind, *servers):
        ask(ports[0], "CLUSTER", "ADDSLOTSRANGE", "0", "8191")
        ask(ports[1], "CLUSTER", "ADDSLOTSRANGE", "8192", "16383")
        ask(ports[0], "CLUSTER", "MEET", "127.0.0.1", str(ports[1]), str(spare[1]))
        for port in ports:
            wait(port, b"cluster_state:ok", "CLUSTER", "INFO")
        for port in ports:  # either node leads to all
            async with opened(f"redis+cluster://127.0.0.1:{port}") as store:
                await works(store, 3.0)
                assert await store.call("GET", store.key("a")) == b"1"


@pytest.mark.slow
async def test_sentinel_follows_a_failover() -> None:
    """With one kind of server: what is slow and of interest is the client's way to the new primary."""
    kind = "valkey"
    first, second, watch = free_ports(3)
    sentinel = (
        f"sentinel monitor main 127.0.0.1 {first} 1",
        "sentinel down-after-milliseconds main 200",
        "sentinel failover-timeout main 1000",
    )
    with started(kind, (first, (), ()), (second, (f"replicaof 127.0.0.1 {first}",), ())) as data:
        wait(second, b"master_link_status:up", "INFO", "replication")
        with started(kind, (watch, sentinel, ("--sentinel",))):
            wait(watch, str(second).encode(), "SENTINEL", "REPLICAS", "main")
            async with opened(f"redis+sentinel://127.0.0.1:{watch}/main") as store:
                await works(store, 3.0)
                data[0].kill()
                async with asyncio.timeout(3.0):
                    while store.up:
                        await asyncio.sleep(0.02)
                await works(store, 15.0)
                assert b"role:master" in ask(second, "INFO", "replication")
