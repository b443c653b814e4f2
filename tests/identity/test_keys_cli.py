"""`llm-gateway keys` as an operator meets it: real processes, on the data directory and on a store."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gateway
from gateway.identity.keys import KeyRing
from tests.journeys.stage import Client
from tests.journeys.test_journey_process import serve
from tests.store_fixtures import Server

NOW = 2_000_000_000.0


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(gateway.__file__).parents[1]),
        "GATEWAY_DATA_DIR": str(folder / "data"),
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "gateway", "keys", *arguments],
        cwd=folder, env=environ | variables, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def ran(folder: Path, *arguments: str, **variables: str) -> Any:
    done = run(folder, *arguments, "--json", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def works(folder: Path, key: str) -> bool:
    return KeyRing.open(folder / "data").authenticate(key, NOW) is not None


def test_create_show_rotate_and_revoke(tmp_path: Path) -> None:
    made = ran(
        tmp_path, "create", "ci", "--group", "team", "--role", "admin", "--model", "a", "--model", "b",
        "--limit", '{"resource": "requests", "burst": 5, "per_min": 6}',
        "--budget", '{"amount": 5, "period": "month"}', "--expires", "5200w", "--metadata", "owner=me=you",
        "--priority", "low", "--weight", "2.5",
    )  # fmt: skip
    key = made.pop("key")
    assert works(tmp_path, key)
    assert (made["group"], made["roles"], made["models"]) == ("team", ["admin"], ["a", "b"])
    assert (made["limits"][0]["burst"], made["budget"]["period"]) == (5, "month")
    assert made["metadata"] == {"owner": "me=you"}
    assert (made["priority"], made["weight"]) == ("low", 2.5)
    assert ran(tmp_path, "list") == {"rows": [made]}
    assert ran(tmp_path, "show", "ci") == ran(tmp_path, "show", made["id"]) == {"rows": [made]}
    again = ran(tmp_path, "rotate", "ci", "--overlap", "0s")["key"]
    assert (works(tmp_path, key), works(tmp_path, again)) == (False, True)
    assert ran(tmp_path, "revoke", made["id"])["status"] == "revoked"
    assert not works(tmp_path, again)


def test_what_people_read_shows_the_text_once(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "ci")
    (key,) = re.findall(r"(?m)^    (llmgw_\S+)$", made.stdout)
    assert works(tmp_path, key)
    shown = [run(tmp_path, *words).stdout for words in (["list"], ["show", "ci"], ["revoke", "ci"], ["list"])]
    assert all(key[:16] not in text or key.split("_")[2] not in text for text in shown)
    assert shown[0].splitlines()[0].split() == [
        "id", "name", "status", "group", "roles", "models", "expires_at", "created_at",
    ]  # fmt: skip
    assert shown[0].splitlines()[1].split()[:6] == [key[6:16], "ci", "active", "-", "-", "all"]
    assert "revoked" in shown[3]


WRONG = [
    (["create", "a b"], "`name` must be 1 to 64"),
    (["create", "x", "--role", "admn"], "valid: admin"),
    (["create", "x", "--limit", "{"], "`--limit` must be JSON"),
    (["create", "x", "--limit", '{"resource": "request"}'], "`limits[0].resource` must be one of requests"),
    (["create", "x", "--expires", "soon"], "`expires_at` must be null, a duration"),
    (["create", "x", "--metadata", "novalue"], "`--metadata` must be KEY=TEXT"),
    (["show", "nonesuch"], "there is no key with this id"),
    (["revoke", "nonesuch"], "there is no key with this id"),
    (["rotate", "nonesuch"], "there is no key with this id"),
    (["rotate", "nonesuch", "--overlap", "1"], "`--overlap` must be a whole number with a unit"),
]


@pytest.mark.parametrize(("words", "told"), WRONG)
def test_wrong_usage_is_one_line_and_changes_nothing(tmp_path: Path, words: list[str], told: str) -> None:
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("llm-gateway: ")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "keys.json").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys.json").write_text("{")
    (tmp_path / "data" / "keys.json").chmod(0o600)
    done = run(tmp_path, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_keys_of_the_environment_are_listed_and_masked(tmp_path: Path) -> None:
    done = run(tmp_path, "list", "--json", GATEWAY_API_KEYS="alice=a-key-of-the-environment")
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["id"], row["origin"]) == ("env:alice", "environment")
    assert "a-key-of" not in done.stdout + done.stderr


def test_two_hosts_with_one_store(tmp_path: Path, valkey_server: Server) -> None:
    for host in ("one", "two"):
        (tmp_path / host).mkdir()
    made = ran(tmp_path / "one", "create", "ci", REDIS_URL=valkey_server.url)
    rows = ran(tmp_path / "two", "list", REDIS_URL=valkey_server.url)["rows"]
    assert [row["id"] for row in rows] == [made["id"]]
    assert works(tmp_path / "two", made["key"])
    ran(tmp_path / "two", "revoke", "ci", REDIS_URL=valkey_server.url)
    assert ran(tmp_path / "one", "show", made["id"], REDIS_URL=valkey_server.url)["rows"][0]["status"] == "revoked"


def test_a_store_that_is_away_is_said_and_the_key_is_made(tmp_path: Path) -> None:
    done = run(tmp_path, "create", "ci", "--json", REDIS_URL=f"unix://{tmp_path}/nobody")
    assert done.returncode == 0
    assert "is away" in done.stderr
    assert "other hosts learn of this when it is back" in done.stderr
    assert works(tmp_path, json.loads(done.stdout)["key"])


async def asked(port: int, path: str, key: str) -> int:
    client = await Client.open(port, key)
    try:
        return (await client.ask("GET", path)).status
    finally:
        client.abort()


async def test_a_running_gateway_follows_and_its_first_key_is_an_admins(tmp_path: Path) -> None:
    variables = {"GATEWAY_DEMO": "on", "GATEWAY_STORE": "off", "GATEWAY_AUTH_FAILURES_PER_MIN": "0"}
    async with serve(tmp_path, **variables) as running:
        assert "the role `admin`" in running.said
        (first,) = set(re.findall(r"llmgw_\w+", running.said))
        assert await asked(running.port, "/admin/api/keys", first) == 200
        made = await asyncio.to_thread(ran, tmp_path, "create", "ci")
        for words, status in ((None, 200), (("revoke", "ci"), 401)):
            if words is not None:
                await asyncio.to_thread(ran, tmp_path, *words)
                running.process.send_signal(signal.SIGHUP)  # sooner than within the second
            async with asyncio.timeout(5.0):
                while await asked(running.port, "/v1/models", made["key"]) != status:
                    await asyncio.sleep(0.05)
        assert await asked(running.port, "/admin/api/keys", first) == 200
    assert made["key"] not in running.said + running.err.decode()
    assert first not in running.err.decode()
