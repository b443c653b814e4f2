"""Who may: every route but the liveness check needs a key, and a key may be for some models only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.app import FAMILIES, OPEN_PATHS, PUBLIC_PATHS
from gateway.config import Model
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Gateway, chat, gateway, provider


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer(models=("sim", "deep")) as one:
        yield one


@pytest.fixture
async def here(sim: SimServer) -> AsyncIterator[Gateway]:
    models = [Model("sim", "sim", aliases=("gpt-4o",)), Model("deep", "deep", aliases=("d",))]
    async with gateway(
        provider("one", sim.url, models=models), limited={"few": frozenset({"sim"})}, auth_failures_per_min=0
    ) as one:
        yield one


def routes(here: Gateway) -> list[tuple[str, str]]:
    return [(method, path) for path, methods in here.app._routes().items() for method in methods]


@pytest.mark.parametrize("how", ["none", "wrong", "wrong scheme", "empty", "x-api-key wrong", "mistyped", "long"])
async def test_every_route_but_probes_needs_a_key(here: Gateway, sim: SimServer, how: str) -> None:
    mistyped = here.key[:-1] + ("0" if here.key[-1] != "0" else "1")
    headers = {
        "none": [],
        "wrong": [("Authorization", "Bearer llmgw_wrong")],
        "wrong scheme": [("Authorization", f"Basic {here.key}")],
        "empty": [("Authorization", "Bearer ")],
        "x-api-key wrong": [("x-api-key", "wrong")],
        "mistyped": [("Authorization", f"Bearer {mistyped}")],
        "long": [("Authorization", f"Bearer {here.key * 50}")],
    }[how]
    asked = routes(here)
    assert len(asked) > 15
    for method, path in [*asked, ("GET", "/nowhere"), ("DELETE", CHAT)]:
        answer = await here.ask(method, path, chat() if method == "POST" else None, headers, key=None)
        if path in OPEN_PATHS or (path in PUBLIC_PATHS and how in ("none", "wrong scheme")):
            assert answer.status == 200
            continue
        assert answer.status == 401, (method, path)
        assert answer.header("WWW-Authenticate") == "Bearer"
        if method == "HEAD":
            continue
        match FAMILIES.get(path, "openai"):
            case "openai":
                assert (answer.error["code"], answer.error["type"]) == ("invalid_api_key", "authentication_error")
            case "anthropic":
                assert answer.json()["error"]["type"] == "authentication_error"
            case "ollama":
                assert "API key" in answer.json()["error"]
        assert here.key not in repr(answer)
        assert mistyped not in repr(answer)
    assert not [one for one in sim.requests if one.method == "POST"]
    assert {record.key for record in here.records} == {""}


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", "Bearer {}"),
        ("Authorization", "bearer {}"),
        ("Authorization", "BEARER   {}"),
        ("authorization", "Bearer {}"),
        ("x-api-key", "{}"),
        ("X-Api-Key", "{}"),
    ],
)
async def test_the_ways_to_present_a_key(here: Gateway, header: tuple[str, str]) -> None:
    name, form = header
    answer = await here.ask("POST", CHAT, chat(), [(name, form.format(here.key))], key=None)
    assert answer.status == 200
    assert here.record.key == "client"


async def test_a_wrong_bearer_is_not_saved_by_another_header(here: Gateway) -> None:
    headers = [("Authorization", "Bearer wrong"), ("x-api-key", here.key)]
    assert (await here.ask("GET", "/v1/models", None, headers, key=None)).status == 401


async def test_the_metrics_listener_is_loopback_and_needs_no_key(here: Gateway) -> None:
    assert here.listeners.metrics_address is not None
    assert here.listeners.metrics_address.host == "127.0.0.1"
    assert (await here.ask("GET", "/metrics", key=None, port=here.metrics_port)).status == 200
    for path in (CHAT, "/v1/models", "/api/local-llm/providers"):
        method = "POST" if path == CHAT else "GET"
        assert (await here.ask(method, path, chat(), port=here.metrics_port)).status in (400, 404)
    assert (await here.ask("GET", "/metrics", key=None)).status == 401
    assert (await here.ask("GET", "/metrics")).status == 200


async def test_a_key_for_some_models(here: Gateway, sim: SimServer) -> None:
    few = here.keys["few"]
    for name in ("sim", "gpt-4o"):
        assert (await here.ask("POST", CHAT, chat(name, max_tokens=1), key=few)).status == 200
    for name in ("deep", "d"):
        answer = await here.ask("POST", CHAT, chat(name), key=few)
        assert answer.status == 403
        assert answer.error["code"] == "model_not_allowed"
        local = await here.ask("POST", "/api/local-llm/proxy", {**chat(name), "provider": "one"}, key=few)
        assert local.status == 403
    assert len([one for one in sim.requests if one.method == "POST"]) == 2
    listed = (await here.ask("GET", "/v1/models", key=few)).json()["data"]
    assert [one["id"] for one in listed] == ["sim", "gpt-4o"]
    providers = (await here.ask("GET", "/api/local-llm/providers", key=few)).json()["providers"]
    assert [model["apiName"] for model in providers[0]["models"]] == ["sim"]


async def test_what_a_limited_key_may_not_use_it_does_not_learn_of(here: Gateway) -> None:
    few = here.keys["few"]
    for document in ({"messages": []}, {"model": "sim"}, chat("nonesuch"), chat("dee"), chat("dep")):
        answer = await here.ask("POST", CHAT, document, key=few)
        assert answer.status in (400, 404)
        assert "deep" not in answer.error["message"], document


async def test_keys_are_told_apart_on_one_connection(here: Gateway) -> None:
    async with here.connect() as client:
        assert (await client.ask("POST", CHAT, chat("deep", max_tokens=1))).status == 200
        assert (await client.ask("POST", CHAT, chat("deep"), key=here.keys["few"])).status == 403
        assert (await client.ask("POST", CHAT, chat("deep"), key=None)).status == 401
        assert (await client.ask("POST", CHAT, chat("deep", max_tokens=1))).status == 200
    assert [record.key for record in here.records] == ["client", "few", "", "client"]
    await asyncio.sleep(0)
