"""A configuration that changes under a running gateway: applied within a second, whole or not at all."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.app import FIXED, App
from gateway.config import Config, load
from gateway.fleet.reload import Reloader
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, Gateway, chat, gateway, until
from tests.journeys.test_journey_process import KEY, one_provider, serve

#: what a change may take, with room for a busy machine
SOON_S = 5.0


def entry(name: str, *urls: str, **more: Any) -> dict[str, Any]:
    return {"provider": name, "baseUrls": list(urls), "runtime": "vllm", "models": [{"apiName": "sim"}], **more}


class Stage:
    """A gateway whose providers stand in a file that is followed."""

    def __init__(self, here: Gateway, file: Path, reloader: Reloader) -> None:
        self.here = here
        self.file = file
        self.reloader = reloader

    @property
    def results(self) -> dict[str, int]:
        return self.here.app.reloads.results

    @property
    def names(self) -> list[str]:
        return [upstream.name for upstream in self.here.app.catalog.upstreams]

    def write(self, *entries: dict[str, Any]) -> None:
        """As careful programs do: whole, beside it, then renamed."""
        beside = self.file.with_name("beside")
        beside.write_text(json.dumps(entries))
        beside.rename(self.file)

    async def became(self, result: str, count: int = 1) -> None:
        await until(lambda: self.results[result] >= count, within_s=SOON_S, what=f"{count} reloads {result}")

    async def status(self, **more: Any) -> int:
        return (await self.here.ask("POST", CHAT, chat(max_tokens=1), **more)).status


@asynccontextmanager
async def stage(folder: Path, *entries: dict[str, Any], **variables: str) -> AsyncIterator[Stage]:
    file = folder / "providers.json"
    file.write_text(json.dumps(entries))
    fixed: dict[str, Any] = {}

    def read() -> Config:
        config = load({"HOME": str(folder), "GATEWAY_PROVIDERS_FILE": str(file), **variables})
        return replace(config, **fixed)

    config = read()
    async with gateway(*config.providers, data_dir=folder, ledger=False) as here:
        fixed |= {name: getattr(here.app.config, name) for name in FIXED if name != "keepalive_timeout_s"}
        reloader = Reloader(read(), read, here.app.apply, here.app.reloads)
        reloader.start()
        try:
            yield Stage(here, file, reloader)
        finally:
            await reloader.stop()


@pytest.fixture
async def sims() -> AsyncIterator[tuple[SimServer, SimServer]]:
    async with SimServer() as one, SimServer() as two:
        yield one, two


def posts(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


async def test_a_host_comes_and_a_host_goes(sims: tuple[SimServer, SimServer], tmp_path: Path) -> None:
    one, two = sims
    async with stage(tmp_path, entry("fleet", one.url)) as here:
        (first,) = here.here.app.catalog.upstreams
        assert await here.status() == 200
        here.write(entry("fleet", one.url, two.url))
        await here.became("applied")
        assert len(here.names) == 2
        assert here.here.app.catalog.upstreams[0] is first, "it lives on, under a name that tells it from the other"
        answers = [await here.here.ask("POST", CHAT, chat(max_tokens=1)) for _ in range(4)]
        assert {answer.status for answer in answers} == {200}
        assert {answer.header("x-gateway-upstream") for answer in answers} == set(here.names)
        assert posts(two)
        here.write(entry("fleet", two.url))
        await here.became("applied", 2)
        before = len(posts(one))
        assert [await here.status() for _ in range(4)] == [200] * 4
        assert len(posts(one)) == before
        text = await here.here.scrape()
        assert 'gateway_config_reloads_total{result="applied"} 2.0' in text
        assert "gateway_config_last_reload_ok 1.0" in text
        assert len([line for line in text.splitlines() if line.startswith("gateway_upstream_in_flight{")]) == 1


async def test_streams_of_a_removed_host_end_whole_and_then_its_connections_are_closed(
    sims: tuple[SimServer, SimServer], tmp_path: Path
) -> None:
    one, two = sims
    one.faults = {"token_s": 0.05}
    async with stage(tmp_path, entry("fleet", one.url)) as here, here.here.connect() as client:
        assert await here.status() == 200  # leaves an idle connection
        (first,) = here.here.app.catalog.upstreams
        client.send("POST", CHAT, chat(max_tokens=40, stream=True))
        answer = await client.head()
        data = await client.events(3)
        here.write(entry("fleet", two.url))
        await here.became("applied")
        assert first.retired
        assert first.in_flight == 1
        assert await here.status() == 200
        assert posts(two), "new requests go elsewhere"
        answer = await client.rest(answer)
        assert (data + answer.body).endswith(b"data: [DONE]\n\n")
        assert (data + answer.body).count(b"data: ") > 40
        transport = here.here.app.transport
        await until(lambda: first not in transport._pools, within_s=SOON_S, what="its pool closed")
        assert (first.in_flight, transport.counts(first)) == (0, (0, 0))


async def test_a_host_that_is_named_again_while_it_still_answers_is_the_same(
    sims: tuple[SimServer, SimServer], tmp_path: Path
) -> None:
    one, two = sims
    one.faults = {"token_s": 0.05}
    async with stage(tmp_path, entry("fleet", one.url)) as here, here.here.connect() as client:
        (first,) = here.here.app.catalog.upstreams
        client.send("POST", CHAT, chat(max_tokens=60, stream=True))
        answer = await client.head()
        here.write(entry("fleet", two.url))
        await here.became("applied")
        here.write(entry("fleet", two.url, one.url))
        await here.became("applied", 2)
        assert here.here.app.catalog.upstreams[1] is first
        assert not first.retired
        assert (await client.rest(answer)).ended
        here.here.assert_idle()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"provider": "fleet", "baseUrl"', "is not JSON"),
        ("", "is empty"),
        ("{}", "must hold `providers`"),
        ('[{"provider": "fleet", "baseUrl": "localhost:1"}, {"provider": "x", "wieght": 1}]', "has no scheme"),
    ],
)
async def test_what_is_wrong_is_said_and_the_one_before_stays(
    sims: tuple[SimServer, SimServer], tmp_path: Path, text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = sims
    caplog.set_level(logging.INFO, "gateway")
    async with stage(tmp_path, entry("fleet", one.url)) as here:
        here.file.write_text(text)
        await here.became("refused")
        assert any(said in line.getMessage() for line in caplog.records)
        if "wieght" in text:
            messages = "\n".join(line.getMessage() for line in caplog.records)
            assert messages.count("configuration refused") == 3, "every problem, not only the first"
            assert "did you mean weight?" in messages
        assert await here.status() == 200
        ready = await here.here.ask("GET", "/readyz")
        assert ready.status == 200
        assert ready.json()["status"] == "degraded"
        assert "refused" in ready.json()["reasons"][0]
        scraped = await here.here.scrape()
        assert 'gateway_config_reloads_total{result="refused"} 1.0' in scraped
        assert "gateway_config_last_reload_ok 0.0" in scraped
        await asyncio.sleep(0.6)
        assert here.results["refused"] == 1, "the same mistake is said once"

        here.write(entry("fleet", two.url))
        await here.became("applied")
        assert (await here.here.ask("GET", "/readyz")).json() == {"status": "ok"}
        assert await here.status() == 200
        assert posts(two)


async def test_a_file_that_is_removed_and_comes_back(sims: tuple[SimServer, SimServer], tmp_path: Path) -> None:
    one, two = sims
    async with stage(tmp_path, entry("fleet", one.url)) as here:
        here.file.unlink()
        await here.became("refused")
        assert await here.status() == 200
        here.write(entry("fleet", two.url))
        await here.became("applied")
        assert await here.status() == 200
        assert posts(two)


async def test_a_file_is_not_believed_while_it_is_being_written(
    sims: tuple[SimServer, SimServer], tmp_path: Path
) -> None:
    """In pieces, each of them a mistake: not one is read before the last."""
    one, two = sims
    async with stage(tmp_path, entry("fleet", one.url)) as here:
        whole = json.dumps([entry("fleet", one.url), entry("second", two.url)])
        with here.file.open("w") as file:
            for at in range(0, len(whole), 5):
                file.write(whole[at : at + 5])
                file.flush()
                await asyncio.sleep(0.04)
        await here.became("applied")
        assert here.names == ["fleet", "second"]
        assert here.results["refused"] <= 2  # of ten looks; a busy machine may let it rest in the middle


async def test_a_link_that_is_swapped_is_followed(sims: tuple[SimServer, SimServer], tmp_path: Path) -> None:
    """As Kubernetes changes a ConfigMap."""
    one, two = sims
    for name, url in (("a", one.url), ("b", two.url)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts.json").write_text(json.dumps([url]))
    (tmp_path / "now").symlink_to("a")
    hosts = str(tmp_path / "now" / "hosts.json")
    listed = {"provider": "fleet", "baseUrlsFile": hosts, "runtime": "vllm", "models": [{"apiName": "sim"}]}
    async with stage(tmp_path, listed) as here:
        assert await here.status() == 200
        (tmp_path / "next").symlink_to("b")
        os.rename(tmp_path / "next", tmp_path / "now")
        await here.became("applied")
        assert await here.status() == 200
        assert (len(posts(one)), len(posts(two))) == (1, 1)
        (tmp_path / "b" / "hosts.json").write_text("[]")
        await here.became("applied", 2)
        answer = await here.here.ask("POST", CHAT, chat())
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        assert answer.header("Retry-After") == "5"
        (tmp_path / "b" / "hosts.json").write_text(json.dumps([two.url, two.url + "/"]))
        await here.became("applied", 3)
        assert await here.status() == 200


async def test_keys_times_weights_and_prices_hold_from_the_next_request(
    sims: tuple[SimServer, SimServer], tmp_path: Path
) -> None:
    one, _ = sims
    async with stage(tmp_path, entry("fleet", one.url, apiKey="old-secret")) as here:
        (first,) = here.here.app.catalog.upstreams
        assert await here.status() == 200
        changed = entry("fleet", one.url, apiKey="new-secret", weight=3, timeouts={"idle": 7})
        changed["models"] = [{"apiName": "sim", "price": {"input": 10, "output": 20}}]
        here.write(changed)
        await here.became("applied")
        assert here.here.app.catalog.upstreams == (first,)
        assert await here.status() == 200
        assert [dict(request.headers)["Authorization"] for request in posts(one)] == [
            "Bearer old-secret",
            "Bearer new-secret",
        ]
        assert (first.weight, first.timeouts.idle_s) == (3, 7.0)
        assert [record.cost is None for record in here.here.records] == [True, False]


async def test_settings_of_the_gateway_itself(
    sims: tuple[SimServer, SimServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a TOML file: client keys, limits, the largest body; what needs a restart is named, and stays."""
    one, _ = sims
    caplog.set_level(logging.INFO, "gateway")
    toml = tmp_path / "gateway.toml"
    toml.write_text("")
    async with stage(tmp_path, entry("fleet", one.url), GATEWAY_CONFIG=str(toml)) as here:
        key = "a-key-that-is-configured-later"
        listen = here.here.app.config.listen
        assert await here.status(key=key) == 401
        limit = '{ name = "few", resource = "requests", scope = "key", burst = 2, per_h = 1 }'
        toml.write_text(
            f'max_body_bytes = 2000\nlimits = [{limit}]\nlog_level = "debug"\nkeepalive_timeout_s = 7\n'
            f'[api_keys]\nlater = "{key}"\n'
        )
        await here.became("applied")
        assert "needs a restart: keepalive_timeout_s" in caplog.text
        assert here.here.app.config.keepalive_timeout_s == 30.0
        assert [await here.status(key=key) for _ in range(3)] == [200, 200, 429]
        big = await here.here.ask("POST", CHAT, chat(max_tokens=1, user="x" * 2000))
        assert big.status == 413
        assert logging.getLogger("gateway").level == logging.DEBUG
        assert here.here.app.config.listen == listen
        toml.write_text("# nothing\n")
        await here.became("applied", 2)
        assert await here.status(key=key) == 401
        assert await here.status() == 200


def test_no_setting_is_forgotten() -> None:
    """Each is fixed, and then named; or read when needed; or set by `App.apply`, in handlers or in what lives on."""
    applied = "".join(map(inspect.getsource, (App.apply, App._routes, App._revise_queue)))
    read_when_needed = {
        "providers_file",
        "ollama_base_url",
        "shutdown_s",
        "drain_notice_s",
        "warnings",
        "origins",
        "files",
    }
    names = {field.name for field in fields(Config)} - set(FIXED) - read_when_needed
    assert [name for name in sorted(names) if f"config.{name}" not in applied] == []


async def test_under_load_no_request_notices(sims: tuple[SimServer, SimServer], tmp_path: Path) -> None:
    one, two = sims
    for sim in sims:
        sim.faults = {"token_s": 0.002}
    async with stage(tmp_path, entry("fleet", one.url, two.url)) as here:
        answers: list[Any] = []
        ended = asyncio.Event()

        async def client() -> None:
            while not ended.is_set():
                answers.append(await here.here.ask("POST", CHAT, chat(max_tokens=20, stream=True)))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for turn in range(6):
            here.write(entry("fleet", *((one.url, two.url) if turn % 2 else (two.url,)), weight=turn + 1))
            await here.became("applied", turn + 1)
        ended.set()
        await asyncio.gather(*clients)
        assert len(answers) > 20
        assert {answer.status for answer in answers} == {200}
        assert all(answer.body.endswith(b"data: [DONE]\n\n") for answer in answers)
        assert {record.outcome for record in here.here.records} == {"ok"}
        here.here.assert_idle()


async def test_waking_it_reads_again_though_no_file_changed(sims: tuple[SimServer, SimServer], tmp_path: Path) -> None:
    async with stage(tmp_path, entry("fleet", sims[0].url)) as here:
        here.reloader.wake()
        await here.became("unchanged")
        assert here.results == {"applied": 0, "unchanged": 1, "refused": 0}


async def test_a_process_follows_its_files_and_sighup(tmp_path: Path) -> None:
    async with SimServer() as sim:
        (tmp_path / ".env").write_text(f"OPENAI_COMPATIBLE_DATA={one_provider(sim)}\nGATEWAY_API_KEYS=ci={KEY}\n")
        async with serve(tmp_path) as process:
            client = await Client.open(process.port, KEY)
            assert (await client.ask("GET", "/v1/models")).json()["data"][0]["id"] == "sim"
            renamed = one_provider(sim).replace('"apiName": "sim"', '"apiName": "sim", "aliases": ["chat"]')
            (tmp_path / ".env").write_text(f"OPENAI_COMPATIBLE_DATA={renamed}\nGATEWAY_API_KEYS=ci={KEY}\n")
            async with asyncio.timeout(SOON_S):
                while len((await client.ask("GET", "/v1/models")).json()["data"]) < 2:
                    await asyncio.sleep(0.05)
            process.process.send_signal(signal.SIGHUP)
            metrics = await Client.open(process.metrics_port)
            async with asyncio.timeout(SOON_S):
                while b'{result="unchanged"} 1.0' not in (await metrics.ask("GET", "/metrics", key=None)).body:
                    await asyncio.sleep(0.05)
            (tmp_path / ".env").write_text("GATEWAY_LISTNE=1\nOPENAI_COMPATIBLE_DATA=[\n")
            async with asyncio.timeout(SOON_S):
                while process.err.count(b"configuration refused") < 2:
                    await asyncio.sleep(0.05)
            assert b"did you mean GATEWAY_LISTEN?" in process.err
            assert (await client.ask("POST", CHAT, chat("chat", max_tokens=1))).status == 200
            client.abort()
            metrics.abort()
