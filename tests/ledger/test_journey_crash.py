"""kill -9 of a real gateway under load: what had begun is in the ledger once, and what was finished adds up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger.recovery import journals, recover
from gateway.ledger.report import BadQuery, parse_by
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, chat
from tests.journeys.test_journey_process import KEY, ROOT, one_provider, serve

CLIENTS = 24


class Load:
    """Clients that ask again and again until their gateway is gone; `whole` are the answers that came to their end."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.pick = random.Random(seed)
        self.whole: dict[str, int] = {}
        self.tasks = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]

    async def _client(self) -> None:
        try:
            client = await Client.open(self.port, KEY)
        except OSError:
            return
        try:
            while True:
                stream = self.pick.random() < 0.5
                answer = await client.ask(
                    "POST", CHAT, chat(max_tokens=(tokens := self.pick.randint(1, 60)), stream=stream)
                )
                if not answer.ended:
                    return
                name = answer.header("x-request-id")
                assert name is not None
                self.whole[name] = tokens
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            client.abort()

    async def ended(self) -> None:
        await asyncio.gather(*self.tasks)


async def command(folder: Path, *words: str, **env: str) -> tuple[int, Any]:
    settings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "GATEWAY_DATA_DIR": str(folder / "data"), **env}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *words, "--json",
        cwd=folder, env=settings, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return process.returncode, json.loads(out) if out else err.decode()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_killed_at_a_random_moment(tmp_path: Path, seed: int) -> None:
    async with SimServer(keep=100_000) as sim:
        sim.faults = {"token_s": 0.002}
        env = {"OPENAI_COMPATIBLE_DATA": one_provider(sim), "GATEWAY_API_KEYS": f"tests={KEY}", "GATEWAY_STORE": "off"}
        whole: dict[str, int] = {}
        for life in range(2):
            async with serve(tmp_path, **env) as running:
                load = Load(running.port, seed * 10 + life)
                await asyncio.sleep(random.Random(seed * 10 + life).uniform(0.3, 1.6))
                running.process.send_signal(signal.SIGKILL)
                await load.ended()
                whole |= load.whole
        begun = {one.header("x-request-id"): one for one in sim.requests if one.method == "POST"}
        assert len(begun) > 2 * CLIENTS

        dead = journals(tmp_path / "data" / "journal")
        records = [record for folder in dead for record in recover(folder)]
        ids = Counter(record.request_id for record in records)
        assert set(ids.values()) == {1}
        assert set(begun) <= set(ids), "what the engine was asked is in the ledger"
        by_id = {record.request_id: record for record in records}
        for name, tokens in whole.items():
            assert by_id[name].outcome == "ok"
            assert by_id[name].completion_tokens == tokens
        open_ones = [record for record in records if record.error == "gateway_ended"]
        assert 1 <= len(open_ones) <= 2 * CLIENTS
        finished = sum(record.completion_tokens or 0 for record in records if record.outcome == "ok")
        assert finished >= sum(whole.values())
        assert finished <= sim.engine.generation_tokens_total

        async with serve(tmp_path, **env) as running:
            code, found = await command(tmp_path, "usage", "--by", "key", "--since", "1h", **env)
            assert code == 0
            await asyncio.sleep(0.3)  # recovery is the first thing that the shipper does
            _, found = await command(tmp_path, "usage", "--by", "key", "--since", "1h", **env)
            (row,) = found["rows"]
            assert (row["key"], row["requests"], row["partial"]) == ("tests", len(records), len(open_ones))
            code, found = await command(tmp_path, "explain", open_ones[0].request_id, **env)
            assert found["rows"][0]["outcome"] == "partial"
            running.terminate()
            await running.ended()


async def test_the_commands_with_the_embedded_store(tmp_path: Path) -> None:
    """The engine's counters against the ledger: equal, through a restart of the gateway, and with none running."""
    async with SimServer() as sim:
        env = {"OPENAI_COMPATIBLE_DATA": one_provider(sim), "GATEWAY_API_KEYS": f"tests={KEY}"}

        async def use(port: int, count: int) -> str:
            client = await Client.open(port, KEY)
            for number in range(count):
                answer = await client.ask("POST", CHAT, chat(max_tokens=number + 1, stream=bool(number % 2)))
                assert answer.status == 200
            client.abort()
            return answer.header("x-request-id") or ""

        async with serve(tmp_path, **env) as running:
            await use(running.port, 3)
            code, found = await command(tmp_path, "reconcile", **env)
            assert (code, found["rows"]) == (0, [])
            last = await use(running.port, 5)
            code, found = await command(tmp_path, "reconcile", **env)
            (row,) = found["rows"]
            assert (row["upstream"], row["ledger_output_tokens"], row["engine_output_tokens"]) == ("one", 15, 15)
            assert (row["input_difference"], row["output_difference"], row["note"]) == (0, 0, "")
            running.terminate()
            assert await running.ended() == 0
        code, found = await command(tmp_path, "usage", "--by", "model,day", "--since", "1h", **env)
        assert [(row["model"], row["requests"]) for row in found["rows"]] == [("sim", 8)]
        code, found = await command(tmp_path, "explain", last, **env)
        assert (found["rows"][0]["completion_tokens"], found["rows"][0]["key"]) == (5, "tests")
        code, text = await command(tmp_path, "explain", "req-nobody", **env)
        assert (code, text["rows"]) == (1, [])
        code, text = await command(tmp_path, "usage", "--by", "colour", **env)
        assert code == 2
        assert "`by` takes" in text


def test_by() -> None:
    assert parse_by("key, model,key") == ("key", "model")
    assert parse_by("") == ()
    with pytest.raises(BadQuery):
        parse_by("key;model")
