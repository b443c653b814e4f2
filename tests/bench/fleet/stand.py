"""The processes of a fleet, and clients in open and closed loops."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.sim.dialect import parse_call
from gateway.sim.faults import NONE
from tests.bench.machine import ROOT, free_port
from tests.fleet.rig import Outcome, ask
from tests.journeys.stage import SIM_MODEL, Client

KEY = "key-of-the-fleet-"
_START_S = 30.0


class Stand:
    """A running fleet behind a running gateway. `port` and `key` are what clients need."""

    def __init__(self, port: int, urls: Sequence[str], control: int, gateway: int, log: Path) -> None:
        self.port = port
        self.key = KEY + "bench"
        self.urls = urls
        self.gateway_pid = gateway
        self._control = control
        self._log = log

    async def control(self, path: str = "", body: Any = None) -> list[dict[str, Any]]:
        """Ask the control door: "" for the state, "/kill?engine=2", "/faults"."""
        return await asyncio.to_thread(self._control_now, path, body)

    def _control_now(self, path: str, body: Any) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self._control, timeout=10)
        try:
            raw = json.dumps(body or {}).encode() if path else None
            connection.request("POST" if path else "GET", "/sim" + path, raw)
            answer = connection.getresponse()
            found = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"control {path}: {found}")
        return found

    def records(self) -> dict[str, dict[str, Any]]:
        """The gateway's request lines, by request id."""
        lines = self._log.read_text(errors="replace").splitlines()
        found = (json.loads(line) for line in lines if line.startswith("{"))
        return {one["request_id"]: one for one in found}


@asynccontextmanager
async def stand(
    engines: int, *options: str, provider: Mapping[str, Any] | None = None, keys: Sequence[str] = (), **settings: str
) -> AsyncIterator[Stand]:
    """`options` are those of `sim serve`, `provider` fields of the pool's entry, `settings` the gateway's variables."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        log = Path(folder) / "log"
        sim = await _start([*_module("sim", "serve", "--port", "0", "--control", "0", "--engines", engines), *options])
        started = [sim]
        try:
            urls, control = await _addresses(sim, engines)
            port = free_port()
            entry = {"provider": "fleet", "runtime": "vllm", "baseUrls": urls, "models": [{"apiName": SIM_MODEL}]}
            environment = {
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "OPENAI_COMPATIBLE_DATA": json.dumps([{**entry, **(provider or {})}]),
                "GATEWAY_API_KEYS": ",".join(f"{name}={KEY}{name}" for name in keys) or f"bench={KEY}bench",
                "GATEWAY_LISTEN": f"127.0.0.1:{port}",
                "GATEWAY_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
                "GATEWAY_DATA_DIR": str(Path(folder) / "data"),
                "GATEWAY_DEMO": "off",
                "GATEWAY_STORE": "off",
                **settings,
            }
            with log.open("wb") as errors:
                gateway = await _start(_module("serve"), env=environment, cwd=folder, stderr=errors)
            started.append(gateway)
            await _answers(port, gateway, log)
            yield Stand(port, urls, control, gateway.pid, log)
        finally:
            for process in reversed(started):
                if process.returncode is None:
                    process.kill()
                await process.communicate()


def _module(*words: object) -> list[str]:
    return [sys.executable, "-m", "gateway", *map(str, words)]


async def _start(command: Sequence[str], **more: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, **more)


async def _addresses(sim: asyncio.subprocess.Process, engines: int) -> tuple[list[str], int]:
    assert sim.stdout is not None
    async with asyncio.timeout(_START_S):
        lines = [(await sim.stdout.readline()).decode() for _ in range(engines + 1)]
    urls = [found[0] for line in lines if (found := re.findall(r"http://[\d.]+:\d+/v1", line))]
    (control,) = re.findall(r"control: http://[\d.]+:(\d+)", lines[-1])
    assert len(urls) == engines, lines
    return urls, int(control)


async def _answers(port: int, gateway: asyncio.subprocess.Process, log: Path) -> None:
    ends_at = time.monotonic() + _START_S
    while time.monotonic() < ends_at and gateway.returncode is None:
        try:
            client = await Client.open(port)
        except ConnectionError:
            await asyncio.sleep(0.02)
            continue
        client.abort()
        return
    raise RuntimeError(f"the gateway did not start: {log.read_text(errors='replace')[-2000:]}")


def expected_text(body: Mapping[str, Any]) -> str:
    """What an engine that is left alone answers."""
    return "".join(parse_call(dict(body), True, (SIM_MODEL,), 1 << 20, NONE).choices[0].pieces)


class Clients:
    """Connections that are opened when they are needed, and used again."""

    def __init__(self, here: Stand, key: str = "") -> None:
        self._here = here
        self._key = key or here.key
        self._idle: list[Client] = []

    async def ask(self, body: dict[str, Any]) -> Outcome:
        client = self._idle.pop() if self._idle else None
        if client is None:
            try:
                client = await Client.open(self._here.port, self._key)
            except ConnectionError:
                return Outcome(0, stream=bool(body.get("stream")))
        outcome = await ask(client, body)
        if outcome.whole and outcome.kind != "broken" and (outcome.header("Connection") or "").lower() != "close":
            self._idle.append(client)
        else:
            client.abort()
        return outcome

    async def at(self, arrivals: Iterable[tuple[float, dict[str, Any]]]) -> list[Outcome]:
        """Open loop: each request at its second, whether or not others have been answered."""
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def one(at: float, body: dict[str, Any]) -> Outcome:
            await asyncio.sleep(max(0.0, began + at - loop.time()))
            return await self.ask(body)

        return list(await asyncio.gather(*(one(at, body) for at, body in arrivals)))

    def close(self) -> None:
        for client in self._idle:
            client.abort()


def quantile(samples: Sequence[float], part: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else float("nan")


def milliseconds(samples: Sequence[float]) -> dict[str, float]:
    """`n`, and mean, p50, p90, p99 and max in milliseconds."""
    if not samples:
        return {"n": 0}
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    figures = {f"{name}_ms": round(quantile(samples, part) * 1000, 2) for name, part in marks.items()}
    mean = {"mean_ms": round(sum(samples) / len(samples) * 1000, 2)}
    return {"n": len(samples)} | mean | figures | {"max_ms": round(max(samples) * 1000, 2)}
