"""The ledger against the engine's own totals: what whole answers used, while store and gateway die."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import pytest

from gateway.config import Secret
from gateway.ledger.report import Window, usage
from gateway.sim import SimServer
from gateway.store.address import parse
from gateway.store.client import Store
from tests.journeys.stage import CHAT, Client, chat, gateway, provider, until
from tests.journeys.test_journey_process import KEY, one_provider, serve
from tests.store_fixtures import Server

COMPLETIONS = "/v1/completions"


async def ask(client: Client, pick: random.Random) -> None:
    """One request of any kind that the engine counts (it counts no embeddings), to its end."""
    kind = pick.choice(("chat", "stream", "stream with usage", "completions"))
    tokens = pick.randint(1, 40)
    words = "word " * pick.randint(1, 200)
    if kind == "completions":
        path, body = COMPLETIONS, {"model": "sim", "prompt": words, "max_tokens": tokens, "stream": pick.random() < 0.5}
    else:
        path, body = CHAT, {**chat(max_tokens=tokens), "messages": [{"role": "user", "content": words}]}
        body["stream"] = kind != "chat"
        if kind == "stream with usage":
            body["stream_options"] = {"include_usage": True}
    answer = await client.ask("POST", path, body)
    assert answer.status == 200
    assert answer.ended


async def totals(root: Path, store: Store) -> tuple[int, int, int]:
    now = int(time.time())
    (row,) = await usage(root, store, Window((), (now - 3600) // 3600 * 3600, now + 60))
    return row["requests"], row["input_tokens"], row["output_tokens"]


@pytest.mark.slow
async def test_the_sum_of_the_ledger_is_that_of_the_engine(tmp_path: Path, store_server: Server) -> None:
    """While the store is killed, comes back, and is paused; and once more when all is shipped."""
    pick = random.Random(11)
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), data_dir=tmp_path, store="auto", redis_url=Secret(store_server.url)) as gate,
    ):
        store = gate.app.store
        assert store is not None
        assert gate.app.journal is not None
        root = gate.app.journal.root
        asked = 0

        async def client(count: int) -> None:
            nonlocal asked
            async with gate.connect() as one:
                for _ in range(count):
                    await ask(one, pick)
                    asked += 1

        for trouble in (None, store_server.kill, store_server.start, store_server.pause, store_server.resume):
            if trouble is not None:
                trouble()
            await asyncio.gather(*(client(15) for _ in range(8)))
        await until(lambda: store.up, 5.0, "the store is back")
        for _ in range(2):
            assert await totals(root, store) == (asked, *sim.tokens_ever)
            await until(lambda: gate.app.shipper is not None and gate.app.shipper.shipped >= asked, 10.0, "shipped")


@pytest.mark.slow
async def test_gateways_killed_while_they_ship(tmp_path: Path, valkey_server: Server) -> None:
    """Whole answers only, then kill -9 of the process at any moment of its shipping: the sums are the engine's."""
    async with SimServer() as sim:
        env = {
            "OPENAI_COMPATIBLE_DATA": one_provider(sim),
            "GATEWAY_API_KEYS": f"tests={KEY}",
            "REDIS_URL": valkey_server.url,
        }
        pick = random.Random(5)
        for _ in range(4):
            async with serve(tmp_path, **env) as running:

                async def client(port: int) -> None:
                    one = await Client.open(port, KEY)
                    for _ in range(20):
                        await ask(one, pick)
                    one.abort()

                await asyncio.gather(*(client(running.port) for _ in range(8)))
                await asyncio.sleep(pick.uniform(0.0, 0.4))
                running.process.send_signal(signal.SIGKILL)
                await running.process.wait()
        store = Store(parse(valkey_server.url))
        await store.start()
        root = tmp_path / "data" / "journal"
        assert await totals(root, store) == (4 * 160, *sim.tokens_ever)
        async with serve(tmp_path, **env) as running:
            await asyncio.sleep(1.0)  # it ships what the dead left
            assert await totals(root, store) == (4 * 160, *sim.tokens_ever)
            running.process.terminate()
            await running.process.wait()
        assert await totals(root, store) == (4 * 160, *sim.tokens_ever)
        await store.close()
