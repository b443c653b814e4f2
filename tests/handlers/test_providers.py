"""`/api/local-llm/providers` over real sockets, with replays of recorded runtimes behind it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
from aiohttp import web

from gateway.answer import EXCHANGE
from gateway.config import Model
from gateway.exchange import Exchange
from gateway.handlers.providers import Providers
from gateway.identity.principals import Principal
from gateway.runtimes import RUNTIMES, Runtime
from gateway.upstreams.control import Control
from gateway.upstreams.upstream import Upstream
from tests.replay import Faults, Replay, load

VLLM = {("GET", "/health"): load("vllm/01-health"), ("GET", "/v1/models"): load("vllm/02-models")}
SMOL = Model("smol", "Smol", supports_tools=False, aliases=("small",), context_window=512)
PLAIN = Model("plain", "Plain")


@dataclass(frozen=True)
class Listed:
    name: str
    upstreams: tuple[Upstream, ...]
    models: tuple[Model, ...] = (SMOL,)
    runtime: Runtime = RUNTIMES["vllm"]
    hint: str = ""


@dataclass(frozen=True)
class Table:
    providers: tuple[Listed, ...]


@dataclass(frozen=True)
class Catalog:
    table: Table


def upstream(name: str, url: str) -> Upstream:
    return Upstream(name, name, RUNTIMES["vllm"], url + "/v1", api_key="sk-upstream-secret")


class Front:
    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def ask(self) -> list[dict[str, Any]]:
        async with self._session.get(self._url) as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            text = await response.text()
            assert "sk-upstream-secret" not in text
            document = json.loads(text)
            assert list(document) == ["providers"]
            providers: list[dict[str, Any]] = document["providers"]
            return providers


@asynccontextmanager
async def front(*providers: Listed, models: frozenset[str] | None = None, **more: Any) -> AsyncIterator[Front]:
    """Serve the handler over `providers` to a key that may use `models`."""
    async with Control(**more) as control:
        handler = Providers(Catalog(Table(providers)), control)

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            exchange = request[EXCHANGE] = Exchange("req-1", request.method, request.path, 0.0, 0.0)
            exchange.principal = Principal("someone", "id", models=models)
            try:
                return await handler(request)
            finally:
                if request.transport is not None:
                    request.transport.writelines(exchange.unsent)

        server = web.Server(answer)
        listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        async with aiohttp.ClientSession() as session:
            yield Front(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/", session)
        listening.close()
        await listening.wait_closed()
        await server.shutdown(1)


async def test_a_healthy_provider() -> None:
    async with Replay(VLLM) as replay, front(Listed("gpu", (upstream("gpu", replay.url),))) as here:
        (provider,) = await here.ask()
    health = provider.pop("health")
    assert provider == {
        "provider": "gpu",
        "runtime": "vllm",
        "baseUrl": f"{replay.url}/v1",
        "models": [
            {
                "apiName": "smol",
                "uiName": "Smol",
                "supportsTools": False,
                "aliases": ["small"],
                "contextWindow": 512,
            }
        ],
    }
    assert (health["status"], health["reason"]) == ("ok", "")
    assert 0 < health["latencyMs"] < 1000
    checked_at = datetime.fromisoformat(health["checkedAt"])
    assert abs(checked_at - datetime.now(UTC)) < timedelta(seconds=2)
    told = {*VLLM, ("GET", "/metrics")}  # the size of its cache
    assert {(seen.method, seen.path) for seen in replay.seen} == told, "no prompt, no tokens"


async def test_each_provider_has_its_own_health() -> None:
    async with Replay({}) as gone:
        pass
    loading = load("llama-server/96-loading")
    async with (
        Replay(VLLM) as fine,
        Replay({("GET", "/health"): loading}) as busy,
        front(
            *(Listed(name, (upstream(name, at.url),)) for name, at in [("a", fine), ("b", busy), ("c", gone)])
        ) as here,
    ):
        a, b, c = await here.ask()
    assert a["health"]["status"] == "ok"
    assert (b["health"]["status"], b["health"]["reason"]) == ("degraded", "503: Loading model")
    assert (c["health"]["status"], c["health"]["reason"]) == ("unreachable", "connection refused")
    assert c["health"]["latencyMs"] is None


async def test_several_hosts_are_listed_and_summed_up() -> None:
    async with Replay({}) as gone:
        pass
    async with Replay(VLLM) as one, Replay(VLLM) as two:
        both = (upstream("gpu-1", one.url), upstream("gpu-2", two.url))
        half = (upstream("gpu-3", one.url), upstream("gpu-4", gone.url))
        none = (upstream("gpu-5", gone.url), upstream("gpu-6", gone.url))
        async with front(Listed("both", both), Listed("half", half), Listed("none", none)) as here:
            a, b, c = await here.ask()
    assert (a["health"]["status"], a["health"]["reason"]) == ("ok", "")
    assert (b["health"]["status"], b["health"]["reason"]) == ("degraded", "gpu-4: connection refused")
    assert c["health"]["status"] == "unreachable"
    assert c["health"]["reason"] == "gpu-5: connection refused; gpu-6: connection refused"
    assert [(u["name"], u["health"]["status"], u["models"]) for u in b["upstreams"]] == [
        ("gpu-3", "ok", ["smol"]),
        ("gpu-4", "unreachable", []),
    ]


async def test_an_empty_models_list_carries_a_hint() -> None:
    async with Replay(VLLM) as replay:
        ups = (upstream("gpu", replay.url),)
        async with front(Listed("gpu", ups, models=()), Listed("told", ups, models=(), hint="look there")) as here:
            ours, theirs = await here.ask()
    assert ours["models"] == []
    assert "OPENAI_COMPATIBLE_DATA" in ours["hint"]
    assert '"models"' in ours["hint"]
    assert '"provider": "gpu"' in ours["hint"]
    assert ours["hint"].endswith("The runtime itself lists: smol.")
    assert theirs["hint"] == "look there"


async def test_a_key_sees_only_the_models_it_may_use() -> None:
    async with Replay(VLLM) as replay:
        listed = Listed("gpu", (upstream("gpu", replay.url),), models=(SMOL, PLAIN))
        async with front(listed, models=frozenset({"plain"})) as here:
            (provider,) = await here.ask()
        async with front(listed, models=frozenset()) as here:
            (bare,) = await here.ask()
    assert provider["models"] == [{"apiName": "plain", "uiName": "Plain", "supportsTools": True}]
    assert bare["models"] == []
    assert "hint" not in bare, "the configuration is not at fault"


async def test_many_callers_cost_one_ping() -> None:
    async with Replay(VLLM, Faults(line_s=0.05)) as replay:
        async with front(Listed("gpu", (upstream("gpu", replay.url),))) as here:
            answers = await asyncio.gather(*(here.ask() for _ in range(20)))
            await here.ask()
        assert len({(seen.method, seen.path) for seen in replay.seen}) == len(replay.seen)
    assert all(provider["health"]["status"] == "ok" for (provider,) in answers)


async def test_silent_hosts_are_asked_in_parallel() -> None:
    async with Replay(VLLM, Faults(silent=True)) as replay:
        listed = [Listed(f"p{n}", (upstream(f"p{n}", replay.url),)) for n in range(8)]
        async with front(*listed, timeout_s=0.4) as here:
            began_at = time.monotonic()
            providers = await here.ask()
            took_s = time.monotonic() - began_at
    assert {provider["health"]["reason"] for provider in providers} == {"timed out after 0.4 s"}
    assert took_s < 2.0


async def test_a_fleet_too_large_for_the_time_is_answered_as_last_seen() -> None:
    async with Replay(VLLM, Faults(silent=True)) as replay:
        listed = [Listed(f"p{n}", (upstream(f"p{n}", replay.url),)) for n in range(3)]
        async with front(*listed, timeout_s=1.5, probes_max=1) as here:
            began_at = time.monotonic()
            providers = await here.ask()
            took_s = time.monotonic() - began_at
    assert 2 < took_s < 3
    reasons = sorted(provider["health"]["reason"] for provider in providers)
    assert reasons == ["not probed yet", "not probed yet", "timed out after 1.5 s"]
    assert {provider["health"]["status"] for provider in providers} == {"unreachable"}


async def test_a_password_in_the_address_is_not_shown() -> None:
    async with Replay(VLLM) as replay:
        url = replay.url.replace("http://", "http://user:hunter2@")
        async with front(Listed("gpu", (upstream("gpu", url),))) as here:
            (provider,) = await here.ask()
    assert provider["baseUrl"] == f"{replay.url}/v1"


async def test_no_providers() -> None:
    async with front() as here:
        assert await here.ask() == []
