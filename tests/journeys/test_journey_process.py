"""The gateway as a process of its own, `python -m gateway serve` with only an environment: start, signals, end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.runtimes import RUNTIMES
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, chat

ROOT = Path(__file__).parent.parent.parent
START_S = 20.0
KEY = "a-key-of-the-environment"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A gateway process. `out` and `err` grow while it runs."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, metrics_port: int) -> None:
        self.process = process
        self.port = port
        self.metrics_port = metrics_port
        self.out = b""
        self.err = b""
        self._readers = [asyncio.create_task(self._read("out")), asyncio.create_task(self._read("err"))]

    async def _read(self, name: str) -> None:
        stream = self.process.stdout if name == "out" else self.process.stderr
        assert stream is not None
        while data := await stream.read(65536):
            setattr(self, name, getattr(self, name) + data)

    async def ready(self) -> None:
        async with asyncio.timeout(START_S):
            while b"OPENAI_BASE_URL" not in self.out and self.process.returncode is None:
                await asyncio.sleep(0.01)
        assert self.process.returncode is None, self.err.decode()

    async def ended(self, within_s: float = 10.0) -> int:
        async with asyncio.timeout(within_s):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
            return code

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    @property
    def said(self) -> str:
        return self.out.decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The request lines of its log."""
        return [json.loads(line) for line in self.err.decode().splitlines() if line.startswith("{")]


@asynccontextmanager
async def serve(folder: Path, *, ready: bool = True, **env: str) -> AsyncIterator[Process]:
    """`python -m gateway serve` in `folder`, with no variable set but these and the addresses."""
    port, metrics_port = free_port(), free_port()
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "GATEWAY_METRICS_LISTEN": f"127.0.0.1:{metrics_port}",
        "GATEWAY_DATA_DIR": str(folder / "data"),
        **env,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve",
        cwd=folder, env=settings, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = Process(process, port, metrics_port)
    try:
        if ready:
            await running.ready()
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await running.ended()


def one_provider(sim: SimServer) -> str:
    return json.dumps([{"provider": "one", "baseUrl": sim.url, "runtime": "vllm", "models": [{"apiName": "sim"}]}])


def found_here() -> list[int]:
    """Ports of runtimes that a first start would find on this machine."""
    found = []
    for port in {runtime.default_port for runtime in RUNTIMES.values() if runtime.default_port}:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.append(port)
    return found


async def bash(command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


# -- the first run --------------------------------------------------------------------------------------------------


async def test_the_first_run_with_nothing_configured(tmp_path: Path) -> None:
    busy = found_here()
    if busy:
        pytest.skip(f"something listens where runtimes do, so this start would not show the demo: {busy}")
    async with serve(tmp_path) as first:
        assert "SIMULATED engine" in first.said
        assert "no model runs" in first.said
        keys = set(re.findall(r"llmgw_\w+", first.said))
        assert len(keys) == 1
        (key,) = keys
        # the printed line, word for word
        (line,) = re.findall(r"(?ms)^ +(curl -N .*?)\n\n", first.said)
        code, out = await bash(line)
        assert code == 0
        assert out.endswith("data: [DONE]\n\n")
        assert out.count("data: {") > 5
        # the printed exports
        exports = "\n".join(re.findall(r"(?m)^ +(export OPENAI_.*)$", first.said))
        script = (
            "import openai; c = openai.OpenAI();"
            "print(c.chat.completions.create(model='demo', messages=[{'role': 'user', 'content': 'x'}]).choices[0]"
            ".message.content)"
        )
        code, out = await bash(f"{exports}\n{sys.executable} -c {json.dumps(script)}")
        assert code == 0
        assert len(out) > 10
        # kept is a hash, for its owner's eyes
        data = tmp_path / "data"
        for name in ("keys.json", "pepper"):
            assert stat.S_IMODE((data / name).stat().st_mode) == 0o600
            assert key.encode() not in (data / name).read_bytes()
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        first.terminate()
        assert await first.ended() == 0
        assert key not in first.err.decode()
        assert {one["status"] for one in first.lines} == {200}
    async with serve(tmp_path) as second:
        assert "llmgw_" not in second.said
        assert "OPENAI_API_KEY" in second.said
        assert "<" not in second.said, "every line can be pasted into a shell"
        client = await Client.open(second.port, key)
        assert (await client.ask("POST", CHAT, chat("demo"))).status == 200
        client.abort()


async def test_configured_by_the_environment_alone(tmp_path: Path) -> None:
    async with SimServer() as sim:
        data = one_provider(sim)
        async with serve(tmp_path, OPENAI_COMPATIBLE_DATA=data, GATEWAY_API_KEYS=f"tests={KEY}") as running:
            assert "SIMULATED" not in running.said
            assert KEY not in running.said, "no key but a new one is ever shown"
            assert "llmgw_" not in running.said
            client = await Client.open(running.port, KEY)
            answer = await client.ask("POST", CHAT, chat(stream=True, max_tokens=5))
            assert answer.events[-1] == "[DONE]"
            metrics = await Client.open(running.metrics_port)
            scrape = await metrics.ask("GET", "/metrics", key=None)
            assert b'gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0' in scrape.body
            client.abort()
            metrics.abort()
            running.terminate()
            assert await running.ended() == 0
            (line,) = running.lines
            assert (line["key"], line["completion_tokens"], line["outcome"]) == ("tests", 5, "ok")
            assert KEY not in running.err.decode()


# -- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_running_stream_finishes(tmp_path: Path, number: signal.Signals) -> None:
    async with SimServer() as sim:
        sim.faults = {"token_s": 0.02}
        data = one_provider(sim)
        async with serve(tmp_path, OPENAI_COMPATIBLE_DATA=data, GATEWAY_API_KEYS=f"tests={KEY}") as running:
            client = await Client.open(running.port, KEY)
            idle = await Client.open(running.port, KEY)
            unused = await Client.open(running.port, KEY)
            client.send("POST", CHAT, chat(stream=True, max_tokens=40))
            answer = await client.head()
            await client.events(3)
            running.process.send_signal(number)
            await asyncio.sleep(0.1)
            with pytest.raises(ConnectionRefusedError):
                await Client.open(running.port)
            late = await idle.ask("GET", "/livez")
            assert (late.status, late.header("Connection")) == (200, "close"), "told to go elsewhere, not cut"
            assert await idle.reader.read() == b""
            answer = await client.rest(answer)
            assert answer.ended
            assert answer.body.endswith(b"data: [DONE]\n\n")
            began_at = time.monotonic()
            assert await running.ended() == 0
            assert time.monotonic() - began_at < 2, "an idle connection holds nothing up"
            assert [(line["status"], line["outcome"]) for line in running.lines] == [(200, "ok")] * 2
            assert running.lines[1]["completion_tokens"] == 40
            for one in (client, idle, unused):
                one.abort()


async def test_past_the_drain_time_a_stream_ends_in_an_error(tmp_path: Path) -> None:
    async with SimServer() as sim:
        sim.faults = {"token_s": 0.02}
        env = {"OPENAI_COMPATIBLE_DATA": one_provider(sim), "GATEWAY_API_KEYS": f"tests={KEY}"}
        async with serve(tmp_path, GATEWAY_SHUTDOWN_S="0.4", **env) as running:
            streams = [await Client.open(running.port, KEY) for _ in range(3)]
            whole = await Client.open(running.port, KEY)
            for client in streams:
                client.send("POST", CHAT, chat(stream=True, max_tokens=5000))
                await client.head()
            whole.send("POST", CHAT, chat(max_tokens=5000))
            await asyncio.sleep(0.1)
            began_at = time.monotonic()
            running.terminate()
            for client in streams:
                body = b""
                while data := await client.chunk():  # to its last chunk: the framing is whole
                    body += data
                last = json.loads(body.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
                assert set(last) == {"error"}
                assert "shutting down" in last["error"]["message"]
                assert b"[DONE]" not in body
            refused = await whole.rest(await whole.head())
            assert refused.status == 502
            assert "shutting down" in refused.error["message"]
            assert await running.ended() == 0
            assert 0.4 < time.monotonic() - began_at < 3
            assert sorted(line["outcome"] for line in running.lines) == ["partial"] * 3 + ["upstream_error"]
            for client in (*streams, whole):
                client.abort()


# -- what keeps it from starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["GATEWAY_LISTEN", "GATEWAY_METRICS_LISTEN"])
async def test_a_port_in_use_is_one_clear_line(tmp_path: Path, which: str) -> None:
    async with SimServer() as sim:
        taken = f"127.0.0.1:{sim.port}"
        env = {"OPENAI_COMPATIBLE_DATA": one_provider(sim), which: taken}
        async with serve(tmp_path, ready=False, **env) as running:
            assert await running.ended(START_S) == 1
            (line,) = running.err.decode().splitlines()
            assert taken in line
            assert "in use" in line
            assert "Traceback" not in line
            assert "llmgw_" not in running.said, "a key that was made and never shown would lock its owner out"
    assert not (tmp_path / "data" / "keys.json").exists()


async def test_a_configuration_that_cannot_be(tmp_path: Path) -> None:
    async with serve(tmp_path, ready=False, OPENAI_COMPATIBLE_DATA="{", GATEWAY_SHUTDOWN_S="soon") as running:
        assert await running.ended(START_S) == 2
        text = running.err.decode()
        assert "OPENAI_COMPATIBLE_DATA" in text
        assert "GATEWAY_SHUTDOWN_S" in text
        assert "Traceback" not in text
