"""Ollama's model management over real sockets, against a replay of recordings of a real Ollama."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.answer import EXCHANGE, send_error
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.handlers.ollama import REGISTRIES, Ollama
from gateway.runtimes import RUNTIMES
from gateway.upstreams.control import Control
from gateway.upstreams.upstream import Upstream
from tests.replay import Faults, Recording, Replay, load

#: the recordings' models come from a registry on the recording machine
SMOL = "127.0.0.1:18055/library/smol:latest"
RECORDED = REGISTRIES | {"127.0.0.1:18055", "127.0.0.1:1"}


class Front:
    """The handlers behind a bare server that renders errors as the middleware does. Keeps the exchanges."""

    def __init__(self, ollama: Ollama, session: aiohttp.ClientSession) -> None:
        self._handlers: dict[tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            ("GET", "/list"): ollama.list_models,
            ("POST", "/pull"): ollama.pull,
            ("POST", "/delete"): ollama.delete,
        }
        self._session = session
        self.exchanges: list[Exchange] = []
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        exchange = request[EXCHANGE] = Exchange("req-1", request.method, request.path, 0.0, 0.0)
        self.exchanges.append(exchange)
        try:
            return await self._handlers[request.method, request.path](request)
        except GatewayError as error:
            assert not exchange.committed, "an error is raised only before the answer has begun"
            return send_error(request, error, exchange, close=not request.content.is_eof())
        except asyncio.CancelledError:
            exchange.outcome = "client_gone"
            raise
        finally:
            if request.transport is not None:
                request.transport.writelines(exchange.unsent)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._session.get(self.url + path) as response:
            return response.status, await response.json()

    async def post(self, path: str, document: object, **more: Any) -> tuple[int, Any]:
        more.setdefault("data", json.dumps(document))
        async with self._session.post(self.url + path, **more) as response:
            return response.status, await response.json()

    def pulling(self, model: str = SMOL) -> Any:
        return self._session.post(self.url + "/pull", json={"model": model})


@asynccontextmanager
async def front(url: str | None, *, enable_pull: bool = True, hold_s: float = 1.0) -> AsyncIterator[Front]:
    """Serve the handlers in front of the Ollama at `url`."""
    upstream = None if url is None else Upstream("ollama", "ollama", RUNTIMES["ollama"], url + "/v1")
    async with Control() as control, aiohttp.ClientSession() as session:
        one = Front(Ollama(control, upstream, enable_pull=enable_pull, registries=RECORDED, hold_s=hold_s), session)
        server = web.Server(one.answer, handler_cancellation=True)
        listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        one.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        try:
            yield one
        finally:
            await session.close()  # first, or the server waits for its idle connections
            listening.close()
            await listening.wait_closed()
            await server.shutdown(1)


def pull(name: str) -> dict[tuple[str, str], list[Recording]]:
    return {("POST", "/api/pull"): load(f"ollama/{name}")[:1]}


def message(document: Any) -> str:
    text = document["error"]["message"]
    assert isinstance(text, str)
    return text


# -- list -----------------------------------------------------------------------------------------------------


async def test_list_is_relayed_as_it_is() -> None:
    (recording,) = load("ollama/o03-tags")
    async with Replay({("GET", "/api/tags"): [recording]}) as replay, front(replay.url, enable_pull=False) as here:
        async with here._session.get(here.url + "/list") as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            assert await response.read() == recording.body
        # Ollama answers 403 to a Host it does not know
        assert replay.seen[0].headers["host"] == f"127.0.0.1:{replay.port}"
        assert "origin" not in replay.seen[0].headers
        assert (here.exchanges[0].provider, here.exchanges[0].upstream) == ("ollama", "ollama")


async def test_not_configured() -> None:
    async with front(None) as here:
        for status, document in [
            await here.get("/list"),
            await here.post("/pull", {"model": "x"}),
            await here.post("/delete", {"model": "x"}),
        ]:
            assert status == 404
            assert document["error"]["code"] == "ollama_not_configured"
            assert "OLLAMA_BASE_URL" in message(document)


async def test_list_of_an_ollama_that_is_away() -> None:
    async with Replay({}) as gone:
        pass
    async with front(gone.url) as here:
        status, document = await here.get("/list")
    assert status == 502
    assert document["error"]["code"] == "upstream_unreachable"
    assert message(document) == "ollama: connection refused"


async def test_list_of_an_ollama_that_fails() -> None:
    oops = Recording(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 16\r\n\r\n", b'{"error":"oops"}')
    async with Replay({("GET", "/api/tags"): [oops]}) as replay, front(replay.url) as here:
        status, document = await here.get("/list")
    assert (status, message(document)) == (502, "ollama: 500: oops")


# -- permission and names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/pull", "/delete"])
async def test_switched_off_by_default(path: str) -> None:
    async with Replay({}) as replay, front(replay.url, enable_pull=False) as here:
        status, document = await here.post(path, {"model": "smol"})
        assert status == 403
        assert "LOCAL_LLM_ENABLE_PULL=true" in message(document)
        assert replay.seen == []


@pytest.mark.parametrize("path", ["/pull", "/delete"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('"smol"', "no JSON object"),
        ("[]", "no JSON object"),
        ("{}", "`model` is missing"),
        ('{"model": ""}', "`model` is missing"),
        ('{"model": 3}', "`model` is missing"),
        ('{"model": null}', "`model` is missing"),
        ('{"model": "smol", "insecure": true}', "unknown field 'insecure'"),
        ('{"model": "../../etc/passwd"}', "no Ollama model name"),
        ('{"model": "a b"}', "no Ollama model name"),
        ('{"model": "a\\nb"}', "no Ollama model name"),
        ('{"model": "smol\\n"}', "no Ollama model name"),
        ('{"model": "smol:"}', "no Ollama model name"),
        ('{"model": "http://evil/a/b"}', "no Ollama model name"),
        ('{"model": "a/b/c/d"}', "no Ollama model name"),
        ('{"model": "a//b"}', "no Ollama model name"),
        ('{"model": "smol@sha256:00"}', "no Ollama model name"),
        ('{"model": "%s"}' % ("x" * 351), "no Ollama model name"),
    ],
)
async def test_bad_bodies_never_reach_ollama(path: str, body: str, says: str) -> None:
    async with Replay({}) as replay, front(replay.url) as here:
        status, document = await here.post(path, None, data=body)
        assert status == 400
        assert says in message(document)
        assert document["error"]["type"] == "invalid_request_error"
        assert replay.seen == []


async def test_a_giant_body_is_refused() -> None:
    async with front("http://127.0.0.1:9") as here:
        status, _ = await here.post("/pull", {"model": "x" * 20_000})
    assert status == 413


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("smol", 200),
        ("llama3.2:1b", 200),
        ("someone/smol:q4_K_M", 200),
        ("hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", 200),
        ("HuggingFace.co/a/b", 200),
        ("registry.ollama.ai/library/smol", 200),
        ("evil.example/library/smol", 403),
        ("169.254.169.254/latest/meta-data", 403),
        ("localhost:5000/library/smol:latest", 403),
    ],
)
async def test_only_known_registries_are_pulled_from(model: str, status: int) -> None:
    async with Replay(pull("o47-pull")) as replay, front(replay.url) as here, here.pulling(model) as response:
        assert response.status == status
        if status == 403:
            assert "registry" in message(await response.json())
            assert replay.seen == []
        else:
            assert json.loads(replay.seen[0].body) == {"model": model, "stream": True}


# -- pull -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o47-pull", "o48-pull-again", "o60-pull-real"])
async def test_pull_relays_every_line(name: str) -> None:
    routes = pull(name)
    async with Replay(routes) as replay, front(replay.url) as here:
        async with here.pulling() as response:
            assert response.status == 200
            assert response.content_type == "application/x-ndjson"
            assert "aiohttp" not in response.headers["Server"]
            assert response.headers["X-Request-Id"] == "req-1"
            body = await response.read()
        assert body == routes["POST", "/api/pull"][0].body
        assert here.exchanges[0].outcome == "ok"
        assert here.exchanges[0].committed
        assert here.exchanges[0].response_bytes == len(body)


async def test_pull_relays_lines_as_they_come() -> None:
    async with Replay(pull("o60-pull-real"), Faults(line_s=0.05)) as replay, front(replay.url) as here:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        arrivals = []
        async with here.pulling() as response:
            async for _ in response.content.iter_any():
                arrivals.append(loop.time() - began_at)
                if len(arrivals) == 4:
                    break
        await asyncio.sleep(0)
    assert here.exchanges[0].upstream_s >= 0.15, "time spent on Ollama is no overhead of the gateway"
    assert arrivals[0] < 2  # three seconds in all
    assert arrivals[3] - arrivals[0] >= 0.1


async def test_pull_of_what_the_registry_has_not_is_a_404() -> None:
    """Ollama says 200, "pulling manifest", and only then the error."""
    async with Replay(pull("o49-pull-not-in-registry"), Faults(line_s=0.05)) as replay, front(replay.url) as here:
        status, document = await here.post("/pull", {"model": "127.0.0.1:18055/library/absent:latest"})
    assert status == 404
    assert document["error"]["code"] == "model_not_found"
    assert message(document).endswith("pull model manifest: file does not exist")


@pytest.mark.parametrize("name", ["o45-pull-unreachable", "o46-pull-unreachable-nostream"])
async def test_pull_from_an_unreachable_registry_is_a_502(name: str) -> None:
    async with Replay(pull(name)) as replay, front(replay.url) as here:
        status, document = await here.post("/pull", {"model": "127.0.0.1:1/library/nothing:latest"})
    assert status == 502
    assert "connection refused" in message(document)


async def test_an_error_after_the_hold_time_is_relayed_and_seen() -> None:
    routes = pull("o49-pull-not-in-registry")
    async with Replay(routes, Faults(line_s=0.1)) as replay, front(replay.url, hold_s=0.02) as here:
        async with here.pulling() as response:
            assert response.status == 200
            assert await response.read() == routes["POST", "/api/pull"][0].body
        assert here.exchanges[0].outcome == "upstream_error"
        error = here.exchanges[0].error
        assert error is not None
        assert "file does not exist" in error.message


async def test_a_cut_pull_never_looks_like_an_end() -> None:
    async with Replay(pull("o60-pull-real"), Faults(cut_bytes=400)) as replay, front(replay.url) as here:
        async with here.pulling() as response:
            assert response.status == 200
            lines = (await response.read()).splitlines()
        assert json.loads(lines[-1]) == {"error": "ollama: the answer was cut"}
        assert all("status" in json.loads(line) for line in lines[:-1])
        assert here.exchanges[0].outcome == "partial"


async def test_a_pull_that_ends_without_success_is_no_success() -> None:
    (whole,) = load("ollama/o47-pull")
    half = Recording(whole.head, b"".join(whole.body.splitlines(keepends=True)[:3]))
    async with Replay({("POST", "/api/pull"): [half]}) as replay, front(replay.url) as here:
        async with here.pulling() as response:
            lines = (await response.read()).splitlines()
        assert json.loads(lines[-1]) == {"error": "Ollama ended the pull without a result"}
        assert here.exchanges[0].outcome == "partial"


@pytest.mark.parametrize("cut_bytes", [0, 20, 40])
async def test_a_pull_cut_before_anything_was_sent_is_a_502(cut_bytes: int) -> None:
    async with Replay(pull("o47-pull"), Faults(cut_bytes=cut_bytes)) as replay, front(replay.url) as here:
        status, document = await here.post("/pull", {"model": "smol"})
    assert (status, message(document)) == (502, "ollama: the answer was cut")


async def test_a_line_without_end_does_not_fill_the_memory() -> None:
    (whole,) = load("ollama/o47-pull")
    endless = Recording(whole.head, b'{"status":"' + b"x" * 400_000 + b'"}\n')
    async with Replay({("POST", "/api/pull"): [endless]}) as replay, front(replay.url) as here:
        status, document = await here.post("/pull", {"model": "smol"})
    assert status == 502
    assert "longer than" in message(document)


@pytest.mark.parametrize("lines_read", [0, 1, 3])
async def test_client_gone_stops_the_pull(lines_read: int) -> None:
    async with Replay(pull("o60-pull-real"), Faults(line_s=0.1)) as replay, front(replay.url) as here:
        if lines_read:
            async with here.pulling() as response:
                for _ in range(lines_read):
                    await response.content.readany()
                response.close()
        else:
            # while the first lines are held back
            asking = asyncio.create_task(here.post("/pull", {"model": "smol"}))
            await asyncio.sleep(0.05)
            asking.cancel()
        await asyncio.wait_for(replay.peer_left.wait(), 2)  # six seconds in all
        assert here.exchanges[0].outcome == "client_gone"


# -- delete ---------------------------------------------------------------------------------------------------


async def test_delete() -> None:
    routes = {("DELETE", "/api/delete"): load("ollama/o43-delete") + load("ollama/o44-delete-missing")}
    async with Replay(routes) as replay, front(replay.url) as here:
        assert await here.post("/delete", {"model": "copy-of-smol"}) == (200, {"status": "success"})
        assert replay.seen[0].body == b'{"model":"copy-of-smol"}'
        status, document = await here.post("/delete", {"model": "copy-of-smol"})
    assert status == 404
    assert document["error"]["code"] == "model_not_found"
    assert "model 'copy-of-smol' not found" in message(document)


async def test_what_came_from_anywhere_can_be_deleted() -> None:
    routes = {("DELETE", "/api/delete"): load("ollama/o43-delete")}
    async with Replay(routes) as replay, front(replay.url) as here:
        assert (await here.post("/delete", {"model": "10.0.0.1:99/library/smol:latest"}))[0] == 200
        assert json.loads(replay.seen[0].body) == {"model": "10.0.0.1:99/library/smol:latest"}
