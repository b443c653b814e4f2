"""Who takes part: how each contestant is started, pinned to its core, found ready, and ended."""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import answers, machine

REFERENCE = "bare-aiohttp"
_READY_S = 20.0
_STOP_S = 5.0
_TURNING_S = 0.01


@dataclass(frozen=True)
class Place:
    """Where a contestant runs: its port, the upstream's, a directory of its own, the core."""

    port: int
    upstream_port: int
    directory: Path
    core: int
    nice: int = 0

    @property
    def upstream(self) -> str:
        return f"http://127.0.0.1:{self.upstream_port}"


@dataclass(frozen=True)
class Plan:
    """A command line and what it needs in its environment."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def _module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def _mock(place: Place) -> Plan:
    return Plan(_module("tests.bench.mock", place.port))


def _bare_aiohttp(place: Place) -> Plan:
    return Plan(_module("tests.bench.bare_proxy", place.port, place.upstream))


#: Wide enough never to refuse here: what is measured is the deciding.
_LIMITS = [
    {"name": "requests", "scope": "key", "resource": "requests", "burst": 10**6, "per_s": 10**6},
    {"name": "tokens", "scope": "key_model", "resource": "total_tokens", "burst": 10**9, "per_s": 10**9},
]


def _gateway(place: Place) -> Plan:
    """One process with keys, metering, metrics and the log line on, and neither limits nor ledger."""
    plan = _gateway_full(place)
    off = {"GATEWAY_STORE": "off", "GATEWAY_LEDGER": "false", "GATEWAY_LIMITS": "[]"}
    return Plan(plan.command, {**plan.environment, **off})


def _gateway_full(place: Place) -> Plan:
    """One process as an operator would have it: limits, the ledger and the embedded store on as well."""
    provider = {
        "provider": "mock",
        "runtime": "vllm",
        "baseUrl": f"{place.upstream}/v1",
        "apiKey": "",
        "models": [{"apiName": answers.MODEL, "uiName": "Mock", "supportsTools": True}],
    }
    environment = {
        "OPENAI_COMPATIBLE_DATA": json.dumps([provider]),
        "GATEWAY_API_KEYS": f"bench={answers.KEY}",
        "GATEWAY_LISTEN": f"127.0.0.1:{place.port}",
        "GATEWAY_METRICS_LISTEN": f"127.0.0.1:{machine.free_port()}",
        "GATEWAY_DATA_DIR": str(place.directory / "data"),
        "GATEWAY_MAX_BODY_BYTES": str(64 << 20),
        "GATEWAY_ACCESS_LOG": "true",
        "GATEWAY_DEMO": "off",
        "GATEWAY_LIMITS": json.dumps(_LIMITS),
    }
    return Plan(_module("gateway", "serve"), environment)


def _gateway_fleet(place: Place) -> Plan:
    """As `gateway`, with eight upstreams to choose from: the mock at eight addresses of this machine."""
    plan = _gateway(place)
    (provider,) = json.loads(plan.environment["OPENAI_COMPATIBLE_DATA"])
    del provider["baseUrl"]
    provider["baseUrls"] = [f"http://{host}:{place.upstream_port}/v1" for host in machine.LOOPBACK]
    return Plan(plan.command, {**plan.environment, "OPENAI_COMPATIBLE_DATA": json.dumps([provider])})


_NGINX = """\
{user}worker_processes 1;
worker_rlimit_nofile 20000;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 8000; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  client_max_body_size 64m;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  upstream mock {{
    server 127.0.0.1:{upstream_port};
    keepalive 1024;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def _nginx(place: Place) -> Plan:
    path = place.directory / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""  # the worker must reach its directory
    path.write_text(
        _NGINX.format(user=user, directory=place.directory, port=place.port, upstream_port=place.upstream_port)
    )
    return Plan(["nginx", "-e", str(place.directory / "error.log"), "-c", str(path)])


PLANS: dict[str, Callable[[Place], Plan]] = {
    "direct": _mock,
    REFERENCE: _bare_aiohttp,
    "nginx": _nginx,
    "gateway": _gateway,
    "gateway-full": _gateway_full,
    "gateway-fleet": _gateway_fleet,
}
#: taking part only when named
NAMED = ("gateway-fleet",)


def available() -> list[str]:
    """The contestants this machine can run, in the order of the table."""
    return [name for name in PLANS if name not in NAMED and (name != "nginx" or shutil.which("nginx"))]


def add_command(name: str, command: str) -> None:
    """Let any other proxy take part: a command line with `{port}`, `{upstream}` and `{upstream_port}` in it."""

    def plan(place: Place) -> Plan:
        words = {"port": place.port, "upstream": place.upstream, "upstream_port": place.upstream_port}
        return Plan([word.format(**words) for word in shlex.split(command)])

    PLANS[name] = plan


class Contestant:
    """A running process (and its children), pinned, its output in `output`; close() ends them all by pid."""

    def __init__(self, name: str, place: Place, *, instead: list[str] | None = None) -> None:
        self.name = name
        self.port = place.port
        place.directory.mkdir(parents=True, exist_ok=True)
        self.output = place.directory / "output.log"
        plan = PLANS[name](place)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        started_at = time.monotonic()
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                instead or plan.command,
                env=kept | {"PYTHONPATH": str(machine.ROOT)} | dict(plan.environment),
                cwd=place.directory,  # not the checkout: a developer's .env is none of our business
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=machine.pinned(place.core, place.nice),
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started_at
        self.pids = machine.tree(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *, timeout_s: float = 2.0) -> bool:
        """One small request on a connection of its own; True if the answer is the mock's, byte for byte."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {answers.KEY}", "Content-Type": "application/json"}
        try:
            connection.request("POST", answers.PATH, answers.request(64), headers)
            reply = connection.getresponse()
            return reply.status == 200 and reply.read() == answers.completion()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _wait_ready(self) -> None:
        ends_at = time.monotonic() + _READY_S
        while not self.ask():
            if self._process.poll() is not None:
                raise NotReady(f"{self.name} ended with code {self._process.returncode}: {self.tail()}")
            if time.monotonic() > ends_at:
                raise NotReady(f"{self.name} gave no right answer within {_READY_S:.0f} s: {self.tail()}")
            time.sleep(_TURNING_S)

    def alive(self) -> bool:
        return self._process.poll() is None

    def tail(self) -> str:
        """The last lines the process wrote."""
        lines = self.output.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-4:])

    def close(self) -> None:
        pids = machine.tree(self._process.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(_STOP_S)


class NotReady(Exception):
    """A contestant did not start, or does not answer."""
