"""Drains, over the admin API and the command line: nothing new, nothing cut, agreed on by all that share a store."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from gateway.config import Secret
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider, until
from tests.store_fixtures import Server

UPSTREAMS = "/admin/api/upstreams"


def admin_key(here: Gateway) -> str:
    here.app.config.data_dir.mkdir(exist_ok=True)
    key, record = here.app.keys.ring.make_key("root", roles=("admin",))
    here.app.keys.ring.add(record)
    return key


class Stage:
    """Two hosts of one provider behind a gateway, and an admin."""

    def __init__(self, here: Gateway, sims: tuple[SimServer, SimServer]) -> None:
        self.here = here
        self.sims = sims
        self.key = admin_key(here)
        self.names = [upstream.name for upstream in here.app.catalog.upstreams]

    async def ask(self, method: str, name: str = "", word: str = "") -> Answer:
        path = UPSTREAMS + (f"/{quote(name, safe='')}" if name else "") + (f"/{word}" if word else "")
        return await self.here.ask(method, path, key=self.key)

    async def cli(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "upstreams", *arguments,
            env={"HOME": "/nonexistent", "LLM_GATEWAY_KEY": self.key, **env},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def served(self) -> list[int]:
        return [len([one for one in sim.requests if one.method == "POST"]) for sim in self.sims]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with (
        SimServer() as one,
        SimServer() as two,
        gateway(provider("fleet", one.url, two.url), data_dir=tmp_path, ledger=False) as here,
    ):
        yield Stage(here, (one, two))


async def test_what_is_shown(stage: Stage) -> None:
    rows = (await stage.ask("GET")).json()["rows"]
    assert [row["name"] for row in rows] == stage.names
    row = rows[0]
    assert row["url"] == stage.sims[0].url
    assert (row["state"], row["breaker"], row["in_flight"], row["drained"]) == ("active", "closed", 0, None)
    assert row["health"]["status"] == "ok"
    assert row["models"] == ["sim"]
    assert row["learned"] == {"prefill_tokens_per_s": {}, "loading_s": {}, "cached_tokens": 0}
    long = {"messages": [{"role": "user", "content": "word " * 2000}], "max_tokens": 1, "stream": True}
    for _ in range(4):
        assert (await stage.here.ask("POST", CHAT, chat(**long))).status == 200
    learned = [one["learned"] for one in (await stage.ask("GET")).json()["rows"]]
    assert any(one["prefill_tokens_per_s"].get("sim") for one in learned)
    assert (await stage.ask("GET", stage.names[1])).json()["url"] == rows[1]["url"]
    refused = await stage.ask("GET", "fleet@127.0.0.1:1")
    assert (refused.status, refused.error["code"]) == (404, "upstream_not_found")
    assert "did you mean" in refused.error["message"]


async def test_only_admins(stage: Stage) -> None:
    for method, path in (("GET", UPSTREAMS), ("POST", f"{UPSTREAMS}/{quote(stage.names[0])}/drain")):
        answer = await stage.here.ask(method, path)
        assert (answer.status, answer.error["code"]) == (403, "role_required")
    assert not stage.here.app.catalog.upstreams[0].draining


async def test_a_drained_upstream_ends_what_it_has_and_gets_nothing_new(stage: Stage) -> None:
    for sim in stage.sims:
        sim.faults = {"token_s": 0.05}
    here = stage.here
    async with here.connect() as client:
        client.send("POST", CHAT, chat(max_tokens=40, stream=True))
        head = await client.head()
        busy = next(upstream for upstream in here.app.catalog.upstreams if upstream.in_flight)
        row = (await stage.ask("POST", busy.name, "drain")).json()
        assert (row["state"], row["in_flight"], row["drained"]["by"]) == ("draining", 1, "root")
        before = stage.served()
        assert {(await here.ask("POST", CHAT, chat(max_tokens=1))).status for _ in range(4)} == {200}
        at = here.app.catalog.upstreams.index(busy)
        assert stage.served()[at] == before[at]
        assert stage.served()[1 - at] == before[1 - at] + 4
        assert f'gateway_upstream_draining{{provider="fleet",upstream="{busy.name}"}} 1.0' in await here.scrape()
        answer = await client.rest(head)
        assert answer.body.endswith(b"data: [DONE]\n\n")
    row = (await stage.ask("POST", busy.name, "resume")).json()
    assert (row["state"], row["drained"]) == ("active", None)
    assert {(await here.ask("POST", CHAT, chat(max_tokens=1))).status for _ in range(4)} == {200}
    assert stage.served()[at] > before[at]


async def test_when_all_of_a_pool_drain_the_client_is_told_so(stage: Stage) -> None:
    for name in stage.names:
        await stage.ask("POST", name, "drain")
    answer = await stage.here.ask("POST", CHAT, chat())
    assert (answer.status, answer.error["code"]) == (503, "no_capacity")
    assert "taken out of service" in answer.error["message"]
    assert answer.header("Retry-After")


async def test_a_drain_outlives_a_reload_and_the_hosts_absence(stage: Stage) -> None:
    app = stage.here.app
    before = app.config
    one, two = stage.sims
    await stage.ask("POST", stage.names[0], "drain")
    for urls in ((two.url,), (one.url, two.url)):
        app.apply(replace(before, providers=(provider("fleet", *urls),)))
    assert [upstream.draining for upstream in app.catalog.upstreams] == [True, False]


async def test_the_command_line(stage: Stage) -> None:
    url = stage.here.url
    code, out, err = await stage.cli("list", "--url", url)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[name, "active"] for name in stage.names]

    for sim in stage.sims:
        sim.faults = {"token_s": 0.05}
    async with stage.here.connect() as client:
        client.send("POST", CHAT, chat(max_tokens=40, stream=True))
        head = await client.head()
        busy = next(upstream for upstream in stage.here.app.catalog.upstreams if upstream.in_flight)
        code, _, err = await stage.cli("drain", busy.name, "--url", url, "--wait", "--timeout", "0")
        assert code == 1
        assert "still run" in err
        waiting = asyncio.create_task(stage.cli("drain", busy.name, "--url", url, "--wait", "--json"))
        assert (await client.rest(head)).ended
        code, out, _ = await waiting
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row["name"], row["state"], row["in_flight"]) == (busy.name, "draining", 0)
    code, out, _ = await stage.cli("resume", busy.name, "--url", url + "/v1", "--json")
    assert (code, json.loads(out)["rows"][0]["state"]) == (0, "active")


async def test_the_command_line_says_what_is_wrong(stage: Stage) -> None:
    url = stage.here.url
    for arguments, env, code, words in (
        (("drain", "fleet@127.0.0.1:1", "--url", url), {}, 2, "no upstream"),
        (("list", "--url", url), {"LLM_GATEWAY_KEY": "a-wrong-key-of-some-length"}, 2, "key"),
        (("list", "--url", url), {"LLM_GATEWAY_KEY": stage.here.key}, 2, "admin"),
        (("list", "--url", url), {"LLM_GATEWAY_KEY": ""}, 2, "LLM_GATEWAY_KEY"),
        (("list", "--url", "http://127.0.0.1:1"), {}, 1, "no gateway answers"),
        (("list",), {"GATEWAY_LISTEN": "127.0.0.1:1"}, 1, "http://127.0.0.1:1"),
    ):
        found, out, err = await stage.cli(*arguments, **env)
        assert (found, out) == (code, ""), arguments
        assert words in err
        assert "Traceback" not in err


# -- with a store ---------------------------------------------------------------------------------------------------


async def test_gateways_of_one_store_agree_and_a_restart_forgets_nothing(tmp_path: Path, valkey_server: Server) -> None:
    async with SimServer() as one, SimServer() as two, AsyncExitStack() as stack:

        async def start(name: str) -> Gateway:
            here = gateway(
                provider("fleet", one.url, two.url),
                data_dir=tmp_path / name, ledger=False, store="auto", redis_url=Secret(valkey_server.url),
            )  # fmt: skip
            return await stack.enter_async_context(here)

        north, south = await start("north"), await start("south")
        stage = Stage(north, (one, two))
        await stage.ask("POST", stage.names[0], "drain")
        first = south.app.catalog.upstreams[0]
        await until(lambda: first.draining, what="the other gateway drains it, too")
        valkey_server.kill()
        await until(lambda: not north.app.store.up, what="the store away")
        await stage.ask("POST", stage.names[0], "resume")
        await stage.ask("POST", stage.names[1], "drain")
        assert [upstream.draining for upstream in north.app.catalog.upstreams] == [False, True]
        assert [upstream.draining for upstream in south.app.catalog.upstreams] == [True, False]
        valkey_server.restart()
        await until(
            lambda: [upstream.draining for upstream in south.app.catalog.upstreams] == [False, True],
            within_s=15,
            what="what was said meanwhile",
        )
        third = await start("third")  # knows it before its first request
        assert [upstream.draining for upstream in third.app.catalog.upstreams] == [False, True]
