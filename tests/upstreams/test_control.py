"""The control plane against real sockets: recordings replayed, and servers that fail in each way there is."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from unittest.mock import Mock

import aiohttp
import pytest
from aioresponses import aioresponses

from gateway.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from gateway.runtimes import RUNTIMES
from gateway.upstreams import control as control_module
from gateway.upstreams.control import Control
from gateway.upstreams.reasons import error_text
from gateway.upstreams.upstream import Upstream
from tests.replay import Faults, Recording, Replay, load

VLLM = {("GET", "/health"): load("vllm/01-health"), ("GET", "/v1/models"): load("vllm/02-models")}
LLAMACPP = {
    ("GET", "/health"): load("llama-server/01-health"),
    ("GET", "/v1/models"): load("llama-server/02-models"),
    ("GET", "/props"): load("llama-server/03-props"),
}
OLLAMA = {("GET", "/api/version"): load("ollama/o02-version"), ("GET", "/api/tags"): load("ollama/o03-tags")}
LITELLM = {
    ("GET", "/health/liveliness"): load("litellm/87-health")[:1],
    ("GET", "/v1/models"): load("litellm/02-models"),
}


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    async with Control() as control:
        yield control


def at(url: str, runtime: str = "vllm", api_key: str = "") -> Upstream:
    upstream = Upstream("up-1", "up", RUNTIMES[runtime], url + "/v1", api_key=api_key)
    upstream.cache_tokens = 0  # asked for once in an upstream's life; here it was
    return upstream


def answer(status: str, body: bytes = b"", *headers: str) -> list[Recording]:
    """An answer made by hand, for what nobody has recorded."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])
    return [Recording(head.encode(), body)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("runtime", "routes", "models"),
    [
        ("vllm", VLLM, ("smol",)),
        ("llamacpp", LLAMACPP, ("smol",)),
        ("ollama", OLLAMA, ("smol:latest",)),
        ("litellm", LITELLM, ("mock", "mock-429", "llama")),
    ],
)
async def test_probe_of_a_recorded_runtime(control, runtime, routes, models) -> None:
    async with Replay(routes) as replay:
        upstream = at(replay.url, runtime)
        health = await control.probe(upstream)
    assert health is upstream.health
    assert (health.status, health.reason) == ("ok", "")
    assert 0 < health.latency_s < 1
    assert health.checked_at == pytest.approx(control.clock(), abs=1)
    assert upstream.models == models
    # free doors, once each, and nothing else was touched
    further = {"ollama": [("GET", "/api/ps")]}.get(runtime, [])
    assert sorted((seen.method, seen.path) for seen in replay.seen) == sorted([*routes, *further])


async def test_what_runtimes_say_of_themselves_is_kept(control) -> None:
    async with Replay(VLLM) as replay:
        await control.probe(upstream := at(replay.url))
        assert (upstream.windows, upstream.slots, upstream.loaded) == ({"smol": 512}, None, frozenset())
    async with Replay(LLAMACPP) as replay:
        await control.probe(upstream := at(replay.url, "llamacpp"))
        assert (upstream.windows, upstream.slots) == ({"smol": 2048}, 4)
    running = b'{"models":[{"name":"smol:latest","model":"smol:latest","size":1,"digest":"","size_vram":1}]}'
    async with Replay({**OLLAMA, ("GET", "/api/ps"): answer("200 OK", running)}) as replay:
        await control.probe(upstream := at(replay.url, "ollama"))
        assert upstream.loaded == {"smol:latest"}
        replay.routes[("GET", "/api/ps")] = answer("200 OK", b'{"models":[]}')
        await control.probe(upstream)
        assert upstream.loaded == frozenset()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"total_slots": -1}', b'{"total_slots": true}'])
async def test_nonsense_at_the_further_door_is_no_matter_of_health(control, body) -> None:
    async with Replay({**LLAMACPP, ("GET", "/props"): answer("200 OK", body)}) as replay:
        upstream = at(replay.url, "llamacpp")
        assert (await control.probe(upstream)).status == "ok"
        assert upstream.slots is None


async def test_a_further_door_that_hangs_costs_a_moment_and_changes_nothing(control, monkeypatch) -> None:
    monkeypatch.setattr(control_module, "DETAILS_S", 0.05)
    async with Replay(LLAMACPP) as replay:
        await control.probe(upstream := at(replay.url, "llamacpp"))
        assert upstream.slots == 4
        replay.routes[("GET", "/props")] = [Recording(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"{")]
        assert (await control.probe(upstream)).status == "ok"
        assert upstream.slots == 4


async def test_probe_asks_plainly(control) -> None:
    async with Replay(VLLM) as replay:
        await control.probe(at(replay.url, api_key="sk-secret"))
    for seen in replay.seen:
        assert seen.headers["authorization"] == "Bearer sk-secret"
        assert seen.headers["accept-encoding"] == "identity"
        assert seen.headers["host"] == f"127.0.0.1:{replay.port}"
        assert "cookie" not in seen.headers


async def test_probe_of_loading_llamacpp(control) -> None:
    loading = load("llama-server/96-loading")
    async with Replay({("GET", "/health"): loading, ("GET", "/v1/models"): loading}) as replay:
        upstream = at(replay.url, "llamacpp")
        upstream.models = ("smol",)
        health = await control.probe(upstream)
    assert (health.status, health.reason) == ("degraded", "503: Loading model")
    assert upstream.models == ("smol",)  # nothing new was learned, so what was known stays


async def test_probe_without_the_key_the_runtime_wants(control) -> None:
    routes = {
        ("GET", "/health"): load("llama-server-tools/01-health"),
        ("GET", "/v1/models"): load("llama-server-tools/53b-no-key")[:1],
    }
    async with Replay(routes) as replay:
        health = await control.probe(at(replay.url, "llamacpp"))
        assert health.status == "degraded"
        assert health.reason == "401: the provider's apiKey is empty and the runtime wants one"
        health = await control.probe(at(replay.url, "llamacpp", api_key="sk-wrong"))
        assert health.reason == "401: the provider's apiKey was refused"


async def test_a_key_repeated_by_the_runtime_is_masked(control) -> None:
    body = b'{"error": {"message": "no such key: sk-secret-1234"}}'
    async with Replay({("GET", "/health"): answer("400 Bad Request", body)}) as replay:
        health = await control.probe(at(replay.url, api_key="sk-secret-1234"))
    assert health.reason == "400: no such key: ***"


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (answer("200 OK", b'{"object":"list","data":[]}'), "the runtime lists no models"),
        (answer("200 OK", b"<html>hello</html>"), "the model list is not JSON"),
        (answer("200 OK", b"{}"), "the model list has no 'data'"),
        (answer("500 Internal Server Error", b"oops"), "HTTP status 500"),
        (answer("502 Bad Gateway", b'{"error":"no\\nhost\\u0000"}'), "502: no host"),
        (answer("404 Not Found", b'{"detail":"Not Found"}'), "404: Not Found"),
    ],
)
async def test_probe_degraded(control, listed, reason) -> None:
    async with Replay({**VLLM, ("GET", "/v1/models"): listed}) as replay:
        health = await control.probe(at(replay.url))
    assert (health.status, health.reason) == ("degraded", reason)
    assert health.latency_s is not None


async def test_probe_follows_no_redirect(control) -> None:
    async with Replay(VLLM) as elsewhere:
        moved = answer("302 Found", b"", f"Location: {elsewhere.url}/v1/models", "Set-Cookie: a=b")
        async with Replay({**VLLM, ("GET", "/v1/models"): moved}) as replay:
            upstream = at(replay.url)
            health = await control.probe(upstream)
            assert health.status == "degraded"
            assert health.reason.startswith("302: it redirects")
            await control.probe(upstream)
            assert all("cookie" not in seen.headers for seen in replay.seen)
        assert elsewhere.seen == []


async def test_probe_trusts_no_proxy_of_the_environment(monkeypatch) -> None:
    async with Replay({}) as proxy, Replay(VLLM) as replay:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with Control() as control:
            assert (await control.probe(at(replay.url))).status == "ok"
        assert proxy.seen == []


async def test_a_missing_health_door_says_nothing(control) -> None:
    async with Replay({("GET", "/v1/models"): load("vllm/02-models")}) as replay:
        assert (await control.probe(at(replay.url))).status == "ok"


async def test_probe_behind_another_prefix(control) -> None:
    routes = {("GET", "/openai/health"): load("vllm/01-health"), ("GET", "/openai/models"): load("vllm/02-models")}
    async with Replay(routes) as replay:
        upstream = Upstream("up-1", "up", RUNTIMES["vllm"], f"{replay.url}/openai")
        assert (await control.probe(upstream)).status == "ok"


async def test_probe_slow() -> None:
    async with Control(slow_s=0.05) as control, Replay(VLLM, Faults(line_s=0.08)) as replay:
        health = await control.probe(at(replay.url))
    assert health.status == "degraded"
    assert re.fullmatch(r"slow: answered after 0\.[12] s", health.reason)


async def test_probe_refused(control) -> None:
    for host in ("127.0.0.1", "localhost"):
        upstream = at(f"http://{host}:{free_port()}")
        health = await control.probe(upstream)
        assert (health.status, health.reason, health.latency_s) == ("unreachable", "connection refused", None)


async def test_probe_of_an_unknown_name(control) -> None:
    health = await control.probe(at("http://no-such-host.invalid:8000"))
    assert health.status == "unreachable"
    assert health.reason == "DNS: the name 'no-such-host.invalid' cannot be resolved"


async def test_probe_times_out() -> None:
    async with Control(timeout_s=0.1) as control, Replay(VLLM, Faults(silent=True)) as replay:
        health = await control.probe(at(replay.url))
        assert (health.status, health.reason) == ("unreachable", "timed out after 0.1 s")
        # and the socket is not left behind
        await asyncio.wait_for(replay.peer_left.wait(), 1)


async def test_probe_hung_up_on(control) -> None:
    async with Replay(VLLM, Faults(hang_up=True)) as replay:
        health = await control.probe(at(replay.url))
    assert (health.status, health.reason) == ("unreachable", "closed the connection without an answer")


async def test_probe_of_a_cut_list(control) -> None:
    async with Replay(VLLM, Faults(cut_bytes=100)) as replay:
        health = await control.probe(at(replay.url))
    assert (health.status, health.reason) == ("unreachable", "the answer was cut")


async def test_probe_of_something_that_is_not_http(control) -> None:
    async with Replay({("GET", "/health"): [Recording(b"SSH-2.0-OpenSSH_9.6\r\n", b"")]}) as replay:
        health = await control.probe(at(replay.url))
    assert (health.status, health.reason) == ("unreachable", "the answer is not valid HTTP")


async def test_probe_of_tls_that_is_none(control) -> None:
    def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        health = await control.probe(at(f"https://127.0.0.1:{port}"))
    assert health.status == "unreachable"
    assert health.reason.startswith("TLS: ")


async def test_a_giant_list_is_not_swallowed(control, monkeypatch) -> None:
    monkeypatch.setattr(control_module, "BODY_MAX_BYTES", 2**20)
    async with Replay({**VLLM, ("GET", "/v1/models"): answer("200 OK", b"x" * (2**20 + 1))}) as replay:
        health = await control.probe(at(replay.url))
    assert (health.status, health.reason) == ("unreachable", "the answer is larger than 1 MiB")


async def test_callers_at_once_share_one_probe(control) -> None:
    async with Replay(VLLM, Faults(line_s=0.02)) as replay:
        upstream = at(replay.url)
        healths = await asyncio.gather(*(control.probe(upstream) for _ in range(20)))
        assert len(replay.seen) == 2
        assert all(health is healths[0] for health in healths)
        await control.probe(upstream)
        assert len(replay.seen) == 4


async def test_one_caller_leaving_does_not_stop_the_probe_of_the_others(control) -> None:
    async with Replay(VLLM, Faults(line_s=0.05)) as replay:
        upstream = at(replay.url)
        leaver = asyncio.create_task(control.probe(upstream))
        stayer = asyncio.create_task(control.probe(upstream))
        await asyncio.sleep(0.01)
        leaver.cancel()
        assert (await stayer).status == "ok"
        assert leaver.cancelled()


async def test_fresh_probes_only_what_is_old() -> None:
    now = 100.0
    async with Control(clock=lambda: now) as control, Replay(VLLM) as replay:
        upstream = at(replay.url)
        await control.fresh(upstream, 1.0)
        now += 0.9
        await control.fresh(upstream, 1.0)
        assert len(replay.seen) == 2
        now += 0.2
        await control.fresh(upstream, 1.0)
        assert len(replay.seen) == 4


async def test_probes_are_bounded() -> None:
    async with Control(probes_max=2) as control, Replay(VLLM, Faults(silent=True)) as replay:
        tasks = [asyncio.create_task(control.probe(at(replay.url))) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert replay.connections == 2
        await control.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_close_stops_the_probes_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with Replay(VLLM, Faults(silent=True)) as replay:
        control = Control()
        await control.start()
        asking = asyncio.create_task(control.probe(at(replay.url)))
        await asyncio.sleep(0.05)
        await control.close()
        await control.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(replay.peer_left.wait(), 1)
    assert asyncio.all_tasks() == before


async def test_errors_name_the_upstream(control) -> None:
    with pytest.raises(UpstreamUnreachable, match=r"^up-1: connection refused$"):
        await control.send("DELETE", at(f"http://127.0.0.1:{free_port()}"), "/x", {"a": 1}, timeout_s=1)
    async with Replay(VLLM, Faults(silent=True)) as replay:
        with pytest.raises(UpstreamTimeout, match=r"^up-1: timed out after 0\.05 s$"):
            await control.send("GET", at(replay.url), "/health", timeout_s=0.05)
        with pytest.raises(UpstreamTimeout, match=r"timed out after 0\.05 s$"):
            await control.get(replay.url + "/health", timeout_s=0.05)
    async with Replay(VLLM, Faults(hang_up=True)) as replay:
        with pytest.raises(UpstreamBroken):
            await control.get(replay.url + "/health")


async def test_send_takes_a_document_with_any_method(control) -> None:
    async with Replay({("DELETE", "/api/delete"): load("ollama/o43-delete")}) as replay:
        done = await control.send("DELETE", at(replay.url, "ollama"), "/api/delete", {"model": "x"}, timeout_s=1)
    assert (done.status, done.body) == (200, b"")
    assert replay.seen[0].body == b'{"model":"x"}'
    assert replay.seen[0].headers["content-type"] == "application/json"


async def test_stream_gives_the_bytes_and_leaving_closes_the_upstream(control) -> None:
    routes = {("POST", "/api/pull"): load("ollama/o60-pull-real")[:1]}
    async with Replay(routes, Faults(line_s=0.01)) as replay:
        upstream = at(replay.url, "ollama")
        async with control.open_stream(upstream, "/api/pull", {}, connect_s=1, idle_s=1) as stream:
            assert stream.status == 200
            body = b""
            while piece := await stream.piece():
                body += piece
        assert body == routes["POST", "/api/pull"][0].body
    async with Replay(routes, Faults(line_s=0.1)) as replay:  # six seconds in all
        upstream = at(replay.url, "ollama")
        async with control.open_stream(upstream, "/api/pull", {}, connect_s=1, idle_s=1) as stream:
            await stream.piece()
        await asyncio.wait_for(replay.peer_left.wait(), 2)


async def read_all(control: Control, url: str, idle_s: float) -> bytes:
    body = b""
    async with control.open_stream(at(url, "ollama"), "/api/pull", {}, connect_s=1, idle_s=idle_s) as stream:
        while piece := await stream.piece():
            body += piece
    return body


async def test_stream_cut_and_stalled(control) -> None:
    routes = {("POST", "/api/pull"): load("ollama/o60-pull-real")[:1]}
    async with Replay(routes) as replay:
        assert await read_all(control, replay.url, 1) == routes["POST", "/api/pull"][0].body
    async with Replay(routes, Faults(cut_bytes=300)) as replay:
        with pytest.raises(UpstreamBroken, match="the answer was cut"):
            await read_all(control, replay.url, 1)
    async with Replay(routes, Faults(line_s=5)) as replay:
        with pytest.raises(UpstreamTimeout):
            await read_all(control, replay.url, 0.1)


async def test_not_started_is_said_so() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        await Control().get("http://127.0.0.1:1/")


class _Response(aiohttp.ClientResponse):
    """aioresponses 0.7.9 builds responses without an argument that aiohttp 3.14 requires."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, stream_writer=Mock(output_size=0))


async def test_a_route_that_cannot_be_made_here(control) -> None:
    """A mock, because a host without a route needs a network to be missing."""
    with aioresponses() as mocked:
        error = aiohttp.ClientConnectorError(None, OSError(113, "No route to host"))  # type: ignore[arg-type]
        mocked.get("http://10.255.255.1:8000/health", exception=error)
        health = await control.probe(at("http://10.255.255.1:8000"))
        assert (health.status, health.reason) == ("unreachable", "No route to host")
        mocked.get(re.compile(".*/health"), status=503, body='{"message": "warming up"}', response_class=_Response)
        health = await control.probe(at("http://10.255.255.1:8000"))
        assert (health.status, health.reason) == ("degraded", "503: warming up")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}', "Loading model"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"detail":[{"loc":["body"]}]}', ""),
        (b"[]", ""),
        (b"", ""),
        (b"<html>", ""),
        (b'{"error":{"message":null}}', ""),
    ],
)
def test_error_text(body: bytes, text: str) -> None:
    assert error_text(body) == text


def test_error_text_is_short() -> None:
    assert len(error_text(b'{"error":"%s"}' % (b"x" * 5000))) == 200
