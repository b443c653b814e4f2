"""A real llama.cpp server and the gateway in front of it, each a process of its own on a free loopback port.

`door` runs a test twice, straight at the runtime and through the gateway: what a test says of the gateway is
then seen to be true of the runtime itself.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .prepare import LLAMA_SERVER, MODEL

KEY = "sk-runtime-tests-0123456789abcdef0123456789abcdef"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]  # lower-case names
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON of each `data:` line of an SSE body, `[DONE]` left out."""
        lines = (line.removeprefix(b"data: ") for line in self.body.split(b"\n") if line.startswith(b"data: "))
        return [json.loads(line) for line in lines if line != b"[DONE]"]


@dataclass
class Door:
    """An address that speaks OpenAI's API."""

    name: str
    port: int
    key: str = "none"

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def send(self, method: str, path: str, body: Any = None, key: str | None = None) -> Answer:
        """One request on its own connection; the body of the answer is read to its end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()


@dataclass
class Llama(Door):
    def busy_slots(self) -> int:
        return sum(slot["is_processing"] for slot in self.send("GET", "/slots").json())


@dataclass
class Gateway(Door):
    metrics_port: int = 0
    lines: list[str] = field(default_factory=list)  # all it wrote to stderr

    def record(self, request_id: str, within_s: float = 2.0) -> dict[str, Any]:
        """The log line of one finished exchange."""

        def find() -> dict[str, Any] | None:
            for line in self.lines:
                if request_id in line and line.startswith("{"):
                    entry = json.loads(line)
                    if entry.get("request_id") == request_id and "outcome" in entry:
                        return dict(entry)
            return None

        found: dict[str, Any] = until(
            find, within_s, lambda: f"no log line of {request_id} in:\n" + "\n".join(self.lines[-5:])
        )
        return found


def until(find: Callable[[], Any], within_s: float, why: Callable[[], str], every_s: float = 0.005) -> Any:
    """What `find` returns as soon as it is true; an assertion fails with `why()` after `within_s`."""
    give_up_at = time.monotonic() + within_s
    while not (found := find()):
        assert time.monotonic() < give_up_at, why()
        time.sleep(every_s)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(process: subprocess.Popen[Any], door: Door, path: str, said: Callable[[], str]) -> None:
    def ready() -> bool:
        assert process.poll() is None, f"{door.name} ended with {process.returncode}:\n{said()}"
        try:
            return door.send("GET", path).status == 200
        except OSError:
            return False

    until(ready, 45, lambda: f"{door.name} is not ready:\n{said()}", every_s=0.05)


def stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """llama-server with two slots of 2048 tokens each."""
    assert LLAMA_SERVER.exists(), "run `make test-runtimes`"
    assert MODEL.exists(), "run `make test-runtimes`"
    door = Llama("llama-server", free_port())
    log = tmp_path_factory.mktemp("llama") / "log"
    command = [
        str(LLAMA_SERVER),
        "-m",
        str(MODEL),
        "--host",
        "127.0.0.1",
        "--port",
        str(door.port),
        "--alias",
        "smol",
    ]
    command += ["--metrics", "--slots", "--no-ui", "-np", "2", "-c", "4096", "-t", "2"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        wait_ready(process, door, "/health", lambda: log.read_text(errors="replace")[-2000:])
        yield door
    finally:
        stop(process)


@pytest.fixture(scope="session")
def gateway(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway in front of `llama`; `smol-plain` is the same model, declared to be without tools."""
    folder = tmp_path_factory.mktemp("gateway")
    door = Gateway("gateway", free_port(), KEY, metrics_port=free_port())
    provider = {
        "provider": "llama",
        "runtime": "llamacpp",
        "baseUrl": llama.url,
        "apiKey": "",
        "models": [
            {"apiName": "smol", "uiName": "SmolLM2 135M", "supportsTools": True},
            {"apiName": "smol-plain", "uiName": "SmolLM2 135M, no tools", "supportsTools": False},
        ],
    }
    process = start_gateway(door, folder, OPENAI_COMPATIBLE_DATA=json.dumps([provider]))
    try:
        wait_ready(process, door, "/livez", lambda: "\n".join(door.lines))
        yield door
    finally:
        stop(process)


def start_gateway(door: Gateway, folder: Path, **env: str) -> subprocess.Popen[bytes]:
    """`python -m gateway serve` in an empty folder (no .env there), with no setting but these."""
    settings = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GATEWAY_API_KEYS": f"tests={door.key}",
        "GATEWAY_LISTEN": f"127.0.0.1:{door.port}",
        "GATEWAY_METRICS_LISTEN": f"127.0.0.1:{door.metrics_port}",
        "GATEWAY_DATA_DIR": str(folder / "data"),
        **env,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"],
        cwd=folder,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as stderr:
            door.lines.extend(line.decode(errors="replace").rstrip("\n") for line in stderr)

    threading.Thread(target=read, name="gateway-stderr", daemon=True).start()
    return process


@pytest.fixture(params=["direct", "gateway"])
def door(request: pytest.FixtureRequest) -> Door:
    found = request.getfixturevalue("llama" if request.param == "direct" else "gateway")
    assert isinstance(found, Door)
    return found
