"""First-run discovery against replays of recorded runtimes on free ports."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from gateway.detect import PORTS, Found, detect, table
from gateway.runtimes import RUNTIMES
from gateway.upstreams.control import Control
from tests.replay import Faults, Recording, Replay, load

Routes = dict[tuple[str, str], list[Recording]]

VLLM: Routes = {("GET", "/v1/models"): load("vllm/02-models")}
LLAMACPP: Routes = {("GET", "/v1/models"): load("llama-server/02-models")}
OLLAMA: Routes = {("GET", "/api/tags"): load("ollama/o03-tags")}
LITELLM: Routes = {("GET", "/v1/models"): load("litellm/02-models")}


def made(status: str, body: bytes) -> list[Recording]:
    """An answer made by hand: no recording of this server was taken."""
    return [Recording(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)), body)]


async def seek(*places: tuple[Routes, tuple[str, ...]], faults: Faults | None = None) -> list[Found]:
    """What is found where these servers listen; addresses are shortened to "port n"."""
    async with AsyncExitStack() as stack, Control() as control:
        replays = [await stack.enter_async_context(Replay(routes, faults or Faults())) for routes, _ in places]
        ports = [(replay.port, names) for replay, (_, names) in zip(replays, places, strict=True)]
        found = await detect(control, 0.3, ports)
        for replay in replays:
            assert len(replay.seen) == 1, "one GET per port"
            assert replay.seen[0].method == "GET"
        places_of = {f"{replay.url}/v1": f"port {n}" for n, replay in enumerate(replays)}
        return [Found(one.runtime, places_of[one.base_url], one.models, one.note) for one in found]


async def test_each_recorded_runtime_is_found() -> None:
    assert await seek(
        (OLLAMA, ("ollama",)), (VLLM, ("vllm",)), (LLAMACPP, ("llamacpp", "localai")), (LITELLM, ("litellm",))
    ) == [
        Found("ollama", "port 0", ("smol:latest",)),
        Found("vllm", "port 1", ("smol",)),
        Found("llamacpp", "port 2", ("smol",)),
        Found("litellm", "port 3", ("mock", "mock-429", "llama")),
    ]


async def test_localai_and_llamacpp_share_a_port() -> None:
    localai: Routes = {("GET", "/v1/models"): made("200 OK", b'{"object":"list","data":[{"id":"m","object":"model"}]}')}
    assert await seek((localai, ("llamacpp", "localai"))) == [Found("localai", "port 0", ("m",))]


async def test_a_runtime_on_the_port_of_another_is_named_rightly() -> None:
    assert await seek((LLAMACPP, ("vllm",))) == [Found("llamacpp", "port 0", ("smol",))]


async def test_one_that_loads_or_wants_a_key_is_shown_as_such() -> None:
    loading: Routes = {("GET", "/v1/models"): load("llama-server/96-loading")}
    locked: Routes = {("GET", "/v1/models"): load("vllm/53b-api-key")}
    empty: Routes = {("GET", "/api/tags"): made("200 OK", b'{"models":[]}')}
    assert await seek((loading, ("llamacpp", "localai")), (locked, ("vllm",)), (empty, ("ollama",))) == [
        Found("llamacpp", "port 0", (), "Loading model"),
        Found("vllm", "port 1", (), "wants an API key"),
        Found("ollama", "port 2", (), "no models yet"),
    ]


async def test_other_servers_are_no_runtimes() -> None:
    pages = [
        made("200 OK", b"<html>my site</html>"),
        made("200 OK", b'{"hello": "world"}'),
        made("404 Not Found", b'{"detail":"Not Found"}'),
        made("401 Unauthorized", b"who are you"),
        [Recording(b"SSH-2.0-OpenSSH_9.6\r\n", b"")],
    ]
    assert await seek(*(({("GET", "/v1/models"): page}, ("vllm",)) for page in pages)) == []


async def test_silent_ports_cost_the_timeout_once() -> None:
    began_at = time.monotonic()
    assert await seek(*[(VLLM, ("vllm",))] * 5, faults=Faults(silent=True)) == []
    assert 0.29 <= time.monotonic() - began_at < 1.4  # one after the other: 1.5


async def test_closed_ports_are_no_error() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with Control() as control:
        assert await detect(control, ports=[(port, ("vllm",))]) == []


def test_ports_are_the_runtimes_own() -> None:
    assert {(port, name) for port, names in PORTS for name in names} == {
        (runtime.default_port, runtime.name) for runtime in RUNTIMES.values() if runtime.default_port
    }


def test_table() -> None:
    found = [
        Found("ollama", "http://127.0.0.1:11434/v1", tuple(f"m{n}" for n in range(8))),
        Found("llamacpp", "http://127.0.0.1:8080/v1", (), "Loading model"),
    ]
    assert table(found) == (
        "RUNTIME    ADDRESS                    MODELS\n"
        "Ollama     http://127.0.0.1:11434/v1  m0, m1, m2, m3, m4, m5, and 2 more\n"
        "llama.cpp  http://127.0.0.1:8080/v1   Loading model"
    )
    assert table([]) == ""
