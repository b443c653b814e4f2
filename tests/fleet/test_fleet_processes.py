"""What only processes can show: engines killed by the kernel (R4), and the gateway told to stop under load (R10)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.rig import Load, Outcome, ask_once, engine_processes, load, pool, unique, upstream_of
from tests.journeys.stage import CHAT, SSE_HEAD, Client, Scripted, chat, event, framed, gateway, until
from tests.journeys.test_journey_process import KEY, Process, serve
from tests.replay import Seen


def not_done(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.kind != "done"]


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_kill_9_of_an_engine_under_load() -> None:
    """R4 with real deaths: ejected within a second, no error for who had no answer yet, back within two seconds."""
    dice = random.Random(41)
    async with engine_processes(3, "--speed", "4") as processes, gateway(pool(processes)) as here:
        loop = asyncio.get_running_loop()
        async with load(here, 12, lambda number: unique(dice, max_tokens=8)) as running:
            await running.count(60)
            victim = processes[1]
            upstream = upstream_of(here, victim)
            for _ in range(2):
                await victim.kill()
                killed_at = loop.time()
                await until(lambda: upstream.breaker.state != "closed", what="the ejection")
                assert loop.time() - killed_at < 1.0
                await running.count(60)
                await victim.start()
                asked = upstream.served
                await until(lambda served=asked: upstream.served > served, within_s=2.0, what="its return")  # type: ignore[misc]
                await running.count(60)
        assert not not_done(running.outcomes), not_done(running.outcomes)[:3]
        here.assert_idle()


def environment(engines: Sequence[Any], **more: str) -> dict[str, str]:
    data: list[dict[str, Any]] = [
        {
            "provider": "fleet",
            "baseUrls": [engine.url for engine in engines],
            "runtime": "vllm",
            "models": [{"apiName": "sim"}],
        }
    ]
    return {"OPENAI_COMPATIBLE_DATA": json.dumps(data), "GATEWAY_API_KEYS": f"tests={KEY}", **more}


class Behind:
    """What a balancer shows its clients: the gateway's port, as long as `/readyz` says so. Asks every 0.1 s."""

    def __init__(self, running: Process) -> None:
        self.port = running.port
        self.key = KEY
        self.ready = True
        self._metrics_port = running.metrics_port
        self._task = asyncio.create_task(self._watch(), name="balancer")

    async def _watch(self) -> None:
        while self.ready:
            probe = await Client.open(self._metrics_port)
            self.ready = (await probe.ask("GET", "/readyz", key=None)).status == 200
            probe.abort()
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_sigterm_under_load_cuts_nothing_and_refuses_nobody(tmp_path: Path) -> None:
    """R10: readiness fails first; who obeys it within the notice meets no closed socket, and every stream ends well."""
    dice = random.Random(101)
    async with engine_processes(2, "--speed", "1") as processes:
        env = environment(processes, GATEWAY_DRAIN_NOTICE_S="1.5", GATEWAY_SHUTDOWN_S="20")
        async with serve(tmp_path, **env) as running:
            balancer = Behind(running)
            loads: list[Load] = []
            async with (
                load(balancer, 8, lambda number: unique(dice, stream=True, max_tokens=50)) as streams,  # 1 s each
                load(balancer, 4, lambda number: unique(dice, max_tokens=2)) as short,
            ):
                loads += [streams, short]
                await short.count(20)
                running.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(5):
                    while balancer.ready:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)  # as slow as a balancer is to act on what it knows
            outcomes = [outcome for one in loads for outcome in one.outcomes]
            assert not not_done(outcomes), not_done(outcomes)[:3]
            assert len(streams.outcomes) >= 8
            assert await running.ended(30) == 0
            assert {(line["status"], line["outcome"]) for line in running.lines} == {(200, "ok")}
            assert len(running.lines) == len(outcomes)
            await balancer.close()


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_five_hundred_clients_that_never_read(tmp_path: Path) -> None:
    """S4: each takes at most 0.6 MiB of the gateway's memory, and its upstream is no longer read."""
    count = 500
    sent = [0] * count
    number = iter(range(count))
    piece = framed(event("x" * 16_000))

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = next(number)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        writer.write(SSE_HEAD)
        while not writer.transport.is_closing():  # without an end, if it were read
            writer.write(piece)
            await writer.drain()
            sent[own] += len(piece)

    async with Scripted(script) as upstream, serve(tmp_path, **environment([upstream])) as running:
        pid = running.process.pid
        sockets = []
        try:
            for _ in range(count):
                client = socket.socket()
                sockets.append(client)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", running.port))
                if len(sockets) == 1:
                    before = rss_bytes(pid)
                body = json.dumps(chat(stream=True)).encode()
                head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                await loop.sock_sendall(client, head.encode() + body)
            await until(lambda: all(sent), within_s=30, what="every stream to have begun")
            last: list[int] = []
            for _ in range(60):
                await asyncio.sleep(0.25)
                if sent == last:
                    break
                last = list(sent)
            assert sent == last, "the upstreams are still read"
            assert max(sent) < 2 * 1024 * 1024, "the kernel holds more of what nobody reads than it was allowed"
            assert rss_bytes(pid) - before <= count * 0.6 * 1024 * 1024
        finally:
            for client in sockets:
                client.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_sigterm_where_nobody_watches_waits_for_nobody(tmp_path: Path) -> None:
    async with engine_processes(1, "--speed", "0") as processes, serve(tmp_path, **environment(processes)) as running:
        running.key = KEY  # type: ignore[attr-defined]
        assert (await ask_once(running, unique(random.Random(1), max_tokens=1))).kind == "done"
        began = asyncio.get_running_loop().time()
        running.terminate()
        assert await running.ended(10) == 0
        assert asyncio.get_running_loop().time() - began < 4
