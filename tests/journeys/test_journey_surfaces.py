"""The API of record: providers, proxy, stream, Ollama's models; through the real app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from gateway.config import Model, Provider
from gateway.handlers.ollama import Ollama
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Scripted, chat, gateway, provider, timeouts, until
from tests.replay import Faults, Recording, Replay, load

PROXY = "/api/local-llm/proxy"
STREAM = "/api/local-llm/stream"
TAGS = load("ollama/o03-tags")
#: every model of the recordings is pulled from here
RECORDED_REGISTRY = "127.0.0.1:18055"


def ollama(url: str, **more: object) -> Provider:
    return Provider("ollama", (f"{url}/v1",), runtime="ollama", discover=True, origin="OLLAMA_BASE_URL", **more)  # type: ignore[arg-type]


def routes(**more: list[Recording]) -> dict[tuple[str, str], list[Recording]]:
    named = {
        "chat": ("POST", "/api/chat"),
        "pull": ("POST", "/api/pull"),
        "delete": ("DELETE", "/api/delete"),
        "openai": ("POST", CHAT),
    }
    health = {("GET", "/api/version"): load("ollama/o02-version"), ("GET", "/api/tags"): TAGS}
    return {**health, **{named[name]: recordings for name, recordings in more.items()}}


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer(models=("sim", "deep")) as one:
        yield one


# -- providers --------------------------------------------------------------------------------------------------


async def test_providers_with_models_and_health(sim: SimServer) -> None:
    async with Scripted() as gone:
        dead = gone.url
    listed = [Model("sim", "Sim 1B", aliases=("s",), context_window=4096), Model("deep", "Deep", supports_tools=False)]
    async with (
        Replay(routes()) as replay,
        gateway(
            provider("local", sim.url, models=listed),
            provider("dead", dead),
            provider("bare", sim.url, models=[]),
            ollama(replay.url),
            ollama_base_url=replay.url,
        ) as here,
    ):
        answer = await here.ask("GET", "/api/local-llm/providers")
        assert answer.status == 200
        assert answer.header("Server") == "llm-gateway"
        local, away, bare, native = answer.json()["providers"]
        assert (local["provider"], local["runtime"], local["baseUrl"]) == ("local", "vllm", sim.url)
        assert local["models"] == [
            {"apiName": "sim", "uiName": "Sim 1B", "supportsTools": True, "aliases": ["s"], "contextWindow": 4096},
            {"apiName": "deep", "uiName": "Deep", "supportsTools": False},
        ]
        assert local["health"]["status"] == "ok"
        assert local["health"]["latencyMs"] > 0
        assert (away["health"]["status"], away["health"]["reason"]) == ("unreachable", "connection refused")
        assert away["health"]["latencyMs"] is None
        assert "models" in bare["hint"]
        assert "OPENAI_COMPATIBLE_DATA" in bare["hint"] or "a test" in bare["hint"]
        assert native["health"]["status"] == "ok"
        assert [model["apiName"] for model in native["models"]] == [
            model["name"] for model in json.loads(TAGS[0].body)["models"]
        ]
        # a ping costs no tokens
        assert {one.method for one in sim.requests} == {"GET"}
        assert {one.method for one in replay.seen} == {"GET"}


async def test_a_provider_that_comes_back_is_seen(sim: SimServer) -> None:
    sim.faults = {"status": 503, "paths": ["/"]}
    async with gateway(provider("one", sim.url)) as here:
        (one,) = (await here.ask("GET", "/api/local-llm/providers")).json()["providers"]
        assert one["health"]["status"] == "degraded"
        assert "503" in one["health"]["reason"]
        sim.faults = {}
        await asyncio.sleep(1.1)  # a finding is reported again for a second
        (one,) = (await here.ask("GET", "/api/local-llm/providers")).json()["providers"]
        assert one["health"]["status"] == "ok"


async def test_readiness(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        assert (await here.ask("GET", "/readyz")).json() == {"status": "ok"}
        here.app.draining = True
        answer = await here.ask("GET", "/readyz")
        assert answer.status == 503
        assert answer.json()["reasons"] == ["the gateway is shutting down"]
        for path in ("/livez", "/health", "/ping"):
            assert (await here.ask("GET", path, key=None)).status == 200
        for path in ("/readyz", "/health/readiness"):  # a balancer holds no key, and need not know why
            stranger = await here.ask("GET", path, key=None)
            assert (stranger.status, stranger.json()) == (503, {"status": "unavailable"})
        inside = await here.ask("GET", "/readyz", key=None, port=here.metrics_port)
        assert inside.json()["reasons"] == ["the gateway is shutting down"]


# -- proxy and stream -------------------------------------------------------------------------------------------


async def test_proxy_is_unstreamed_whatever_was_asked(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": False}):
            answer = await here.ask("POST", PROXY, chat(max_tokens=3, **more))
            assert answer.header("Content-Type") == "application/json"
            assert answer.json()["object"] == "chat.completion"
        bodies = [one.json() for one in sim.requests if one.method == "POST"]
        assert all(body["stream"] is False and "stream_options" not in body for body in bodies)
        assert not any(record.stream for record in here.records)


async def test_stream_is_streamed_whatever_was_asked(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        for more in ({}, {"stream": False}, {"stream": None}, {"stream": True}):
            answer = await here.ask("POST", STREAM, chat(max_tokens=3, **more))
            assert (answer.header("Content-Type") or "").startswith("text/event-stream")
            assert answer.events[-1] == "[DONE]"
        assert all(record.stream for record in here.records)


async def test_ollamas_own_stream_passes_as_ndjson() -> None:
    (recording,) = load("ollama/o10-chat-stream")
    async with Replay(routes(chat=[recording])) as replay, gateway(ollama(replay.url)) as here:
        for model in ("smol:latest", "smol"):
            answer = await here.ask("POST", STREAM, {**chat(model), "provider": "ollama", "options": {"num_ctx": 64}})
            assert answer.status == 200
            assert answer.header("Content-Type") == "application/x-ndjson"
            assert answer.body == recording.body
            last = json.loads(recording.body.splitlines()[-1])
            assert (here.record.prompt_tokens, here.record.completion_tokens) == (
                last["prompt_eval_count"],
                last["eval_count"],
            )
            assert (here.record.outcome, here.record.stream, here.record.model) == ("ok", True, "smol:latest")
        sent = json.loads(replay.seen[-1].body)
        assert sent == {**chat("smol:latest"), "options": {"num_ctx": 64}, "stream": True}
        here.assert_idle()


async def test_ollamas_own_unstreamed_answer() -> None:
    (recording,) = load("ollama/o11-chat")
    async with Replay(routes(chat=[recording])) as replay, gateway(ollama(replay.url)) as here:
        answer = await here.ask("POST", PROXY, chat("smol"))
        assert answer.body == recording.body
        assert here.record.completion_tokens == json.loads(recording.body)["eval_count"]


async def test_ollama_by_its_openai_side() -> None:
    (recording,) = load("ollama/11-chat-stream")
    async with Replay(routes(openai=[recording])) as replay, gateway(ollama(replay.url)) as here:
        answer = await here.ask("POST", CHAT, chat("smol", stream=True, stream_options={"include_usage": True}))
        assert answer.body == recording.body


# -- Ollama's models --------------------------------------------------------------------------------------------


@pytest.fixture
def any_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recordings' models came from a registry on the recording machine."""
    allowed = frozenset({RECORDED_REGISTRY, "127.0.0.1:1"})
    defaults = {**Ollama.__init__.__kwdefaults__, "registries": allowed, "hold_s": 0.3}
    monkeypatch.setattr(Ollama.__init__, "__kwdefaults__", defaults)


async def test_the_list() -> None:
    async with Replay(routes()) as replay, gateway(ollama(replay.url), ollama_base_url=replay.url) as here:
        answer = await here.ask("GET", "/api/local-llm/ollama/list")
        assert answer.body == TAGS[0].body
        assert answer.header("Server") == "llm-gateway"


async def test_pull_and_delete_are_off_by_default() -> None:
    async with (
        Replay(routes(pull=load("ollama/o47-pull"), delete=load("ollama/o43-delete"))) as replay,
        gateway(ollama(replay.url), ollama_base_url=replay.url) as here,
    ):
        for verb in ("pull", "delete"):
            answer = await here.ask("POST", f"/api/local-llm/ollama/{verb}", {"model": "smol"})
            assert answer.status == 403
            assert answer.error["code"] == "pull_disabled"
            assert "LOCAL_LLM_ENABLE_PULL" in answer.error["message"]
        assert {one.method for one in replay.seen} == {"GET"}


@pytest.mark.usefixtures("any_registry")
async def test_pull_streams_ollamas_progress() -> None:
    (recording,) = load("ollama/o47-pull")[:1]
    async with (
        Replay(routes(pull=[recording]), Faults(line_s=0.005)) as replay,
        gateway(ollama(replay.url), ollama_base_url=replay.url, enable_pull=True) as here,
    ):
        answer = await here.ask("POST", "/api/local-llm/ollama/pull", {"model": f"{RECORDED_REGISTRY}/library/smol"})
        assert answer.status == 200
        assert answer.header("Content-Type") == "application/x-ndjson"
        assert answer.header("Server") == "llm-gateway"
        assert answer.header("X-Content-Type-Options") == "nosniff"
        assert answer.body == recording.body
        assert json.loads(answer.body.splitlines()[-1]) == {"status": "success"}
        assert "aiohttp" not in repr(answer.headers).lower()
        await here.settled(1)
        assert (here.record.outcome, here.record.provider) == ("ok", "ollama")
        assert here.record.response_bytes == len(recording.body)


@pytest.mark.usefixtures("any_registry")
async def test_an_error_inside_a_pull_is_an_error() -> None:
    (recording,) = load("ollama/o45-pull-unreachable")[:1]
    assert recording.status == 200
    async with (
        Replay(routes(pull=[recording])) as replay,
        gateway(ollama(replay.url), ollama_base_url=replay.url, enable_pull=True) as here,
    ):
        answer = await here.ask("POST", "/api/local-llm/ollama/pull", {"model": "127.0.0.1:1/library/smol"})
        assert answer.status == 502
        assert answer.error["message"]
        assert here.record.outcome == "upstream_error"


@pytest.mark.usefixtures("any_registry")
async def test_a_client_that_leaves_a_pull_stops_it() -> None:
    async with (
        Replay(routes(pull=load("ollama/o60-pull-real")[:1]), Faults(line_s=0.1)) as replay,
        gateway(ollama(replay.url), ollama_base_url=replay.url, enable_pull=True) as here,
        here.connect() as client,
    ):
        client.send("POST", "/api/local-llm/ollama/pull", {"model": f"{RECORDED_REGISTRY}/library/smol"})
        await client.head()
        await client.chunk()
        replay.peer_left.clear()
        client.leave()
        assert await until(replay.peer_left.is_set, what="Ollama let go") < 2
        await here.settled(1)
        assert (here.record.status, here.record.outcome) == (499, "client_gone")


async def test_delete() -> None:
    async with (
        Replay(routes(delete=load("ollama/o43-delete"))) as replay,
        gateway(ollama(replay.url), ollama_base_url=replay.url, enable_pull=True) as here,
    ):
        answer = await here.ask("POST", "/api/local-llm/ollama/delete", {"model": "smol"})
        assert answer.json() == {"status": "success"}
        (deleted,) = [one for one in replay.seen if one.method == "DELETE"]
        assert json.loads(deleted.body) == {"model": "smol"}


async def test_without_ollama_its_routes_say_so(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url), enable_pull=True) as here:
        for method, path in (("GET", "list"), ("POST", "pull"), ("POST", "delete")):
            body = {"model": "x"} if method == "POST" else None
            answer = await here.ask(method, f"/api/local-llm/ollama/{path}", body)
            assert answer.status == 404
            assert "OLLAMA_BASE_URL" in answer.error["message"]


# -- discovery --------------------------------------------------------------------------------------------------


async def test_models_that_a_server_names_can_be_asked(sim: SimServer) -> None:
    one = Provider("found", (sim.url,), runtime="vllm", discover=True, timeouts=timeouts(), origin="a test")
    async with gateway(one) as here:
        assert [model["id"] for model in (await here.ask("GET", "/v1/models")).json()["data"]] == ["sim", "deep"]
        assert (await here.ask("POST", CHAT, chat("deep", max_tokens=1))).status == 200


async def test_an_upstream_that_was_down_at_the_start_is_found_later() -> None:
    async with SimServer() as first:
        port = first.port
    one = Provider("late", (f"http://127.0.0.1:{port}/v1",), runtime="vllm", discover=True, origin="a test")
    async with gateway(one) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 404
        assert "'late'" in answer.error["message"]
        async with SimServer(port=port):
            await until(lambda: here.app.catalog.table.pools, within_s=5, what="the model")
            assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200


# -- a stale connection -----------------------------------------------------------------------------------------


async def test_connections_that_the_runtime_closes_while_idle_are_invisible(sim: SimServer) -> None:
    sim.faults = {"close_idle_random_s": 0.004}
    async with gateway(provider("one", sim.url)) as here:

        async def worker() -> None:
            async with here.connect() as client:
                for _ in range(40):
                    answer = await client.ask("POST", CHAT, chat(max_tokens=1))
                    assert answer.status == 200
                    await asyncio.sleep(0.002)

        await asyncio.gather(*(worker() for _ in range(20)))
        assert {record.status for record in here.records} == {200}
        assert len(here.records) == 800
        assert sim.connections_total > 50, "connections were closed in between"
        here.assert_idle()
