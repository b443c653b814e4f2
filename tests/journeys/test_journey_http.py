"""HTTP at the edge: what is refused, how it is said, and what never reaches an upstream or comes from one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

import aiohttp
import pytest
from aiohttp import http_parser

from gateway import server
from gateway.sim import SimServer
from tests.journeys.stage import (
    CHAT,
    READ_S,
    Answer,
    Gateway,
    Scripted,
    chat,
    event,
    gateway,
    provider,
    until,
    whole,
)


@pytest.fixture
async def upstream() -> AsyncIterator[Scripted]:
    async with Scripted(answer=whole(b'{"ok":true}'), keep=True) as one:
        yield one


@pytest.fixture
async def here(upstream: Scripted) -> AsyncIterator[Gateway]:
    async with gateway(provider("one", upstream.url, api_key="sk-upstream"), max_body_bytes=10_000) as one:
        yield one


async def raw(here: Gateway, data: bytes) -> Answer:
    """Send bytes as they are; the answer, and whether the connection was closed behind it."""
    async with here.connect() as client:
        client.writer.write(data)
        answer = await client.head()
        await client.rest(answer)
        return answer


def request(
    here: Gateway, line: str = f"POST {CHAT} HTTP/1.1", *lines: str, host: str = "gw", body: bytes | None = None
) -> bytes:
    body = json.dumps(chat()).encode() if body is None and line.startswith("POST") else body or b""
    head = [line, f"Host: {host}", f"Authorization: Bearer {here.key}", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def assert_ours(answer: Answer, status: int, code: str | None = None) -> None:
    """An error of ours: our body, our headers, no version of any software, no word of the request."""
    assert answer.status == status, answer
    assert answer.header("Content-Type") == "application/json"
    assert answer.header("Server") == "llm-gateway"
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Cache-Control") == "no-store"
    assert answer.error["message"]
    if code is not None:
        assert answer.error["code"] == code
    whole_answer = repr(answer)
    for word in ("aiohttp", "Python", "CANARY"):
        assert word not in whole_answer


# -- start (the server) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.14.3", "3.9.0", "2.3.10"])
def test_an_aiohttp_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    server.require_aiohttp()
    monkeypatch.setattr(aiohttp, "__version__", version)
    with pytest.raises(RuntimeError, match=r"3\.14\.4 or newer"):
        server.require_aiohttp()


@pytest.mark.parametrize("version", ["3.14.4", "3.15.0", "4.0.0a1"])
def test_a_newer_aiohttp_is_not(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(aiohttp, "__version__", version)
    server.require_aiohttp()


def test_aiohttp_without_its_c_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    with pytest.raises(RuntimeError, match="C parser"):
        server.require_aiohttp()


async def test_the_default_keep_alive_is_applied(upstream: Scripted) -> None:
    async with gateway(provider("one", upstream.url)) as here:
        assert here.app.config.keepalive_timeout_s == 30.0
    async with gateway(provider("one", upstream.url), keepalive_timeout_s=0.3) as here:
        loop = asyncio.get_running_loop()
        async with here.connect() as idle, here.connect() as slow, here.connect() as kept:
            began_at = loop.time()
            slow.writer.write(b"GET /livez HTTP/1.1\r\nHost: gw\r\nX-Slow: ")
            assert (await kept.ask("GET", "/livez")).status == 200
            for client in (kept, idle, slow):
                async with asyncio.timeout(READ_S):
                    rest = await client.reader.read()
                assert b" 200 " not in rest
            assert 0.2 < loop.time() - began_at < 3


# -- bodies -------------------------------------------------------------------------------------------------------


async def test_a_body_too_long_by_its_own_word_is_refused_unread(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Content-Length", "10001")])
        answer = await client.rest(await client.head())  # not one byte of it was sent
        assert_ours(answer, 413, "request_too_large")
        assert "10000" in answer.error["message"]
        assert answer.header("Connection") == "close"
    assert not upstream.seen


async def test_a_chunked_body_is_refused_when_it_gets_too_long(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Transfer-Encoding", "chunked")])
        for _ in range(11):
            client.writer.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            await asyncio.sleep(0)
        assert_ours(await client.rest(await client.head()), 413)
    assert not upstream.seen


async def test_a_chunked_body_goes_upstream_whole(here: Gateway, upstream: Scripted) -> None:
    body = json.dumps(chat()).encode()
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Transfer-Encoding", "chunked")])
        for i in range(0, len(body), 7):
            client.writer.write(b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]))
            await asyncio.sleep(0.001)
        client.writer.write(b"0\r\n\r\n")
        assert (await client.head()).status == 200
    assert upstream.seen[0].body == body
    assert upstream.seen[0].headers["content-length"] == str(len(body))
    assert "transfer-encoding" not in upstream.seen[0].headers


async def test_a_body_that_does_not_come_is_408(upstream: Scripted) -> None:
    loop = asyncio.get_running_loop()
    async with gateway(provider("one", upstream.url), body_timeout_s=0.3) as here, here.connect() as client:
        began_at = loop.time()
        client.send("POST", CHAT, None, [("Content-Length", "100")])
        client.writer.write(b'{"model"')
        answer = await client.rest(await client.head())
        assert_ours(answer, 408, "request_timeout")
        assert 0.299 <= loop.time() - began_at < 2.0  # uvloop reads its clock once a turn, to the millisecond
        assert answer.header("Connection") == "close"
        assert here.record.status == 408


async def test_a_body_that_ceases_to_be_http_is_400(upstream: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.passage.resolve.RATE_GRACE_S", 0.2)
    async with gateway(provider("one", upstream.url)) as here, here.connect() as client:
        client.send("POST", CHAT, None, [("Transfer-Encoding", "chunked")])
        client.writer.write(b'5\r\n{"mod\r\n')
        await until(lambda: here.app.in_flight() == 1, what="a request in flight")
        client.writer.write(b"no chunk\r\n")
        assert_ours(await client.rest(await client.head()), 400, "malformed_http")
        assert await client.reader.read() == b"", "nothing after it is taken for a request"


async def test_a_body_that_comes_too_slowly_is_408(upstream: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.passage.resolve.RATE_GRACE_S", 0.2)
    async with gateway(provider("one", upstream.url), min_body_rate=1000) as here, here.connect() as client:
        client.send("POST", CHAT, None, [("Content-Length", "100")])

        async def drip() -> None:
            for _ in range(100):
                client.writer.write(b" ")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert_ours(await client.rest(await client.head()), 408)
        dripping.cancel()


async def test_expect_100_continue(here: Gateway, upstream: Scripted) -> None:
    body = json.dumps(chat()).encode()
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Content-Length", str(len(body))), ("Expect", "100-continue")])
        async with asyncio.timeout(READ_S):
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(body)
        assert (await client.head()).status == 200
    async with here.connect() as client:  # a refusal comes instead of the go-ahead
        client.send("POST", CHAT, None, [("Content-Length", "99999"), ("Expect", "100-continue")])
        assert_ours(await client.rest(await client.head()), 413)
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Content-Length", "9"), ("Expect", "the-unexpected")])
        assert_ours(await client.rest(await client.head()), 417)
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
async def test_a_coded_body_is_415(here: Gateway, upstream: Scripted, coding: str) -> None:
    assert_ours(await here.ask("POST", CHAT, chat(), [("Content-Encoding", coding)]), 415)
    assert not upstream.seen


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"sim","messages":[],"model":"sim"}',
        b'{"model":"sim","messages":[],"mod\\u0065l":"other"}',
        b'{"model":"sim","messages":[],"Model":"other"}',
        b'{"model":"sim","messages":[],"STREAM":true}',
        b'{"model":"sim","messages":[],"Max_Tokens":5}',
        b'{"model":"sim","messages":[],"N":5}',
        b'{"model":"sim","messages":[],"Options":{}}',
        b'{"model":"sim","messages":[],"Keep_Alive":0}',
        b'{"model":"sim","messages":[],"x":1,"x":2}',
        b"",
        b"[]",
        b'"CANARY"',
        b"{",
        b'{"model":"sim","messages":[]}CANARY',
        b'\xef\xbb\xbf{"model":"sim","messages":[]}',
        b'{"model":"sim","messages":["\xff"]}',
        b'{"a":' * 4000 + b"1" + b"}" * 1900,
    ],
)
async def test_a_body_that_two_parsers_may_read_in_two_ways_is_400(
    here: Gateway, upstream: Scripted, body: bytes
) -> None:
    answer = await here.ask("POST", CHAT, body)
    if len(body) > 10_000:
        assert_ours(answer, 413)
    else:
        assert_ours(answer, 400)
    assert not upstream.seen


# -- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../v1/chat/completions",
        "/v1/./chat/completions",
        "/v1/chat/completions/..",
        "/v1/%2e%2e/chat/completions",
        "/v1/%2E/chat/completions",
        "/v1%2fchat/completions",
        "/v1%2Fchat%2Fcompletions",
        "/v1/chat%5ccompletions",
        "/v1\\chat\\completions",
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%0d%0aX: y",
        "/v1/chat/completions#x",
        "http://CANARY.example/v1/chat/completions",
        "https://CANARY.example:443/v1/chat/completions",
        "http://gw@CANARY/v1/chat/completions",
    ],
)
async def test_odd_targets_are_400(here: Gateway, upstream: Scripted, target: str) -> None:
    assert_ours(await raw(here, request(here, f"POST {target} HTTP/1.1")), 400)
    assert not upstream.seen


async def test_the_absolute_form_passes_with_the_same_authority(here: Gateway, upstream: Scripted) -> None:
    answer = await raw(here, request(here, f"POST http://gw{CHAT} HTTP/1.1"))
    assert answer.status == 200
    assert upstream.seen[0].path == CHAT
    assert here.record.route == CHAT


async def test_a_query_is_the_gateways_only(here: Gateway, upstream: Scripted) -> None:
    answer = await raw(here, request(here, f"POST {CHAT}?api-version=1&x=../..//%2e HTTP/1.1"))
    assert answer.status == 200
    assert upstream.seen[0].path == CHAT
    assert here.record.route == CHAT


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/v1/", "/v1/chat", "/V1/chat/completions", "/v1/chat/completions/", "/v1/responses/resp_1",
        "/v1/messages/batches", "/api/show",
        "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/sha256:1",
        "/slots", "/slots/0", "/props", "/lora-adapters", "/completion", "/tokenize", "/v1/load_lora_adapter",
        "/sleep", "/wake_up", "/reset_prefix_cache", "/collective_rpc", "/is_sleeping", "/server_info", "/config",
        "/key/generate", "/model/new", "/.env", "/favicon.ico", "/api/local-llm", "/api/local-llm/ollama/create",
        "/v1/chat%20completions", "/v1/chat/completions;x",
    ],
)  # fmt: skip
async def test_what_is_not_named_does_not_exist(here: Gateway, upstream: Scripted, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        body = chat() if method == "POST" else None
        answer = await here.ask(method, path, body)
        assert_ours(answer, 404, "unknown_path")
    assert not upstream.seen
    assert {record.route for record in here.records} == {"-"}


# -- methods and versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
async def test_the_wrong_method_is_405(here: Gateway, upstream: Scripted, method: str) -> None:
    answer = await here.ask(method, CHAT)
    assert answer.status == 405
    assert answer.header("Allow") == "POST"
    assert not upstream.seen


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "BREW", "PURGE", "post"])
async def test_methods_that_nobody_needs_are_refused(here: Gateway, upstream: Scripted, method: str) -> None:
    answer = await raw(here, request(here, f"{method} {CHAT} HTTP/1.1"))
    assert answer.status in (400, 405)
    assert_ours(answer, answer.status)
    assert not upstream.seen


async def test_connect_is_refused(here: Gateway, upstream: Scripted) -> None:
    for target in ("127.0.0.1:22", "gw:80", CHAT):
        answer = await raw(here, request(here, f"CONNECT {target} HTTP/1.1"))
        assert answer.status in (400, 405)
        assert_ours(answer, answer.status)


@pytest.mark.parametrize("line", ["Content-Length: 2\r\n\r\n{}", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_body_on_a_get_is_refused(here: Gateway, method: str, line: str) -> None:
    head = f"{method} /v1/models HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer {here.key}\r\n"
    async with here.connect() as client:
        client.writer.write((head + line + "\r\n").encode())
        answer = await client.head()
        assert answer.status == 400


@pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/3.0", "HTTP/9.9"])
async def test_other_versions_are_505(here: Gateway, upstream: Scripted, version: str) -> None:
    assert_ours(await raw(here, request(here, f"POST {CHAT} {version}")), 505)
    assert not upstream.seen


async def test_http_1_0(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        client.writer.write(request(here, f"POST {CHAT} HTTP/1.0"))
        answer = await client.rest(await client.head())
        assert (answer.status, answer.body) == (200, b'{"ok":true}')
        assert await client.reader.read() == b"", "closed behind the answer"
    async with here.connect() as client:
        client.writer.write(request(here, f"POST {CHAT} HTTP/1.0", "Connection: keep-alive"))
        answer = await client.rest(await client.head())
        assert answer.header("Connection") == "keep-alive"
        client.writer.write(request(here, f"POST {CHAT} HTTP/1.0"))
        assert (await client.head()).status == 200


async def test_http_1_0_gets_a_stream_without_chunks() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here, here.connect() as client:
        sim.faults = {"token_s": 0.01}
        body = json.dumps(chat(stream=True, max_tokens=5)).encode()
        client.writer.write(request(here, f"POST {CHAT} HTTP/1.0", body=body))
        answer = await client.head()
        assert answer.header("Transfer-Encoding") is None
        assert client.framing == "close"
        answer = await client.rest(answer)
        assert answer.events[-1] == "[DONE]"


PARSER_FAULTS = [
    b"CANARY\r\n\r\n",
    b"GET /livez\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: a\r\nCANARY\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: a\r\nCANARY : x\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: a\r\nX: CANARY\x00\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"CANARY" * 20_000 + b"\r\n\r\n",
    b"GET /" + b"CANARY" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: CANARY\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
    b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: CANARY\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("data", PARSER_FAULTS, ids=range(len(PARSER_FAULTS)))
async def test_what_the_parser_refuses_has_our_body_and_echoes_nothing(here: Gateway, data: bytes) -> None:
    answer = await raw(here, data)
    assert 400 <= answer.status < 500 or answer.status == 505  # 505: a request line of HTTP/0.9
    assert_ours(answer, answer.status)
    assert answer.header("Connection") == "close"
    assert "CANARY" not in here.log_text()
    assert "CANARY" not in await here.scrape()
    assert (await here.ask("GET", "/livez")).status == 200


async def test_parser_errors_are_counted(here: Gateway) -> None:
    await raw(here, b"CANARY\r\n\r\n")
    assert 'gateway_requests_total{route="-",status="400"} 1.0' in await here.scrape()


async def test_a_bad_chunk_in_a_body(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        client.send("POST", CHAT, None, [("Transfer-Encoding", "chunked")])
        client.writer.write(b"CANARY\r\nxx")
        answer = await client.rest(await client.head())
        assert_ours(answer, 400)
        assert not upstream.seen


# -- headers ------------------------------------------------------------------------------------------------------


async def test_request_headers_go_upstream_by_allow_list(here: Gateway, upstream: Scripted) -> None:
    foreign = {
        "Cookie": "session=CANARY",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Host": "CANARY.example",
        "Forwarded": "for=10.0.0.1",
        "X-Real-IP": "10.0.0.1",
        "Origin": "https://CANARY.example",
        "Referer": "https://CANARY.example/",
        "User-Agent": "CANARY/1.0",
        "Proxy-Authorization": "Basic CANARY",
        "X-Api-Key": "CANARY",
        "Api-Key": "CANARY",
        "X-Custom": "CANARY",
        "Accept-Encoding": "gzip, br",
        "X-Request-Id": "CANARY",
        "X-Sim-Fault": "silent",
        "Range": "bytes=0-1",
        "If-None-Match": "CANARY",
        "Upgrade": "h2c",
        "TE": "trailers",
    }
    passing = {"Accept": "text/event-stream", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "OpenAI-Beta": "x=1"}
    answer = await here.ask("POST", CHAT, chat(), {**foreign, **passing}.items())
    assert answer.status == 200
    sent = upstream.seen[0].headers
    assert set(sent) == {
        "host", "user-agent", "content-type", "accept-encoding", "authorization", "x-request-id", "content-length",
        "accept", "traceparent", "openai-beta",
    }  # fmt: skip
    assert sent["host"] == upstream.url.split("/")[2]
    assert sent["authorization"] == "Bearer sk-upstream"
    assert sent["accept-encoding"] == "identity"
    assert sent["user-agent"].startswith("local-llm-gateway/")
    assert sent["accept"] == "text/event-stream"
    assert sent["x-request-id"] == answer.header("X-Request-Id") == here.record.request_id
    assert "CANARY" not in str(sent)
    assert here.key not in str(sent)


async def test_an_upstream_without_a_key_gets_no_credential(upstream: Scripted) -> None:
    async with gateway(provider("one", upstream.url)) as here:
        await here.ask("POST", CHAT, chat())
        assert "authorization" not in upstream.seen[0].headers


async def test_one_content_type_goes_upstream(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        body = json.dumps(chat()).encode()
        client.send("POST", CHAT, None, [("Content-Length", str(len(body))), ("Content-Type", "text/plain")])
        client.writer.write(body)
        assert (await client.head()).status == 200


@pytest.mark.parametrize("name", ["X_Api_Key", "Content_Length", "_", "Authorization_"])
async def test_header_names_with_an_underscore_are_refused(here: Gateway, upstream: Scripted, name: str) -> None:
    assert_ours(await here.ask("POST", CHAT, chat(), [(name, "1")]), 400, "invalid_header")
    for path in ("/v1/models", "/livez", "/api/local-llm/providers", "/admin/api/keys", "/nowhere"):
        assert_ours(await here.ask("GET", path, None, [(name, "1")]), 400, "invalid_header")
    assert not upstream.seen


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [("GET", "/livez", None, 200), ("GET", "/v1/models", "", 200), ("POST", CHAT, None, 401), ("GET", "/x", "", 404)],
)
async def test_our_own_answers_have_a_date(here: Gateway, method: str, path: str, key: str | None, status: int) -> None:
    """RFC 9110 section 6.6.1, in its own format, and of now."""
    before = int(time.time())
    answer = await here.ask(method, path, None if method == "GET" else chat(), key=key)
    assert answer.status == status
    date = answer.header("Date")
    assert date is not None
    assert date.endswith(" GMT")
    assert before <= parsedate_to_datetime(date).timestamp() <= time.time()


@pytest.mark.parametrize("date", ["", "Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_relayed_answer_has_one_date_the_upstreams_if_it_says_one(date: str, kind: str) -> None:
    body = b"{}" if kind == "application/json" else event("a") + b"data: [DONE]\n\n"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{date}Content-Length: {len(body)}\r\n\r\n"
    async with Scripted(answer=head.encode() + body) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat(stream=kind != "application/json"))
        told = answer.header("Date")
        assert told is not None
        if date:
            assert f"Date: {told}\r\n" == date
        else:
            assert abs(parsedate_to_datetime(told).timestamp() - time.time()) < 60


async def test_bytes_that_are_no_request_get_a_dated_answer(here: Gateway) -> None:
    async with here.connect() as client:
        client.writer.write(b"what is this\r\n\r\n")
        answer = await client.head()
        assert answer.status == 400
        assert answer.header("Date")


async def test_response_headers() -> None:
    extra = "".join(
        f"{line}\r\n"
        for line in [
            "Connection: keep-alive, X-Hop",
            "X-Hop: CANARY",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: CANARY",
            "Upgrade: CANARY",
            "Trailer: CANARY",
            "Set-Cookie: CANARY=1",
            "Server: CANARY/1.0",
            "X-Powered-By: CANARY",
            "Access-Control-Allow-Origin: *",
            "Access-Control-Allow-Credentials: CANARY",
            "Strict-Transport-Security: CANARY",
            "Cache-Control: public, CANARY",
            "Location: http://CANARY/",
            "WWW-Authenticate: CANARY",
            "X-Request-Id: CANARY",
            "x-litellm-model-api-base: http://CANARY",
            "llm_provider-x: CANARY",
            "X-Content-Type-Options: CANARY",
            "Retry-After: 7",
            "X-Custom: kept",
            "openai-processing-ms: 12",
        ]
    )
    async with (
        Scripted(answer=whole(b"{}", extra=extra), keep=True) as upstream,
        gateway(provider("one", upstream.url)) as here,
    ):
        answer = await here.ask("POST", CHAT, chat())
    names = [name.lower() for name, _ in answer.headers]
    assert sorted(names) == sorted(
        [
            "content-type", "content-length", "x-content-type-options", "cache-control", "x-request-id",
            "retry-after", "x-custom", "openai-processing-ms", "x-gateway-upstream", "x-gateway-route-reason", "date",
        ]
    )  # fmt: skip
    assert "CANARY" not in str(answer.headers)
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Cache-Control") == "no-store"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v1/models", "/metrics", "/api/local-llm/providers"])
async def test_our_own_answers(here: Gateway, path: str) -> None:
    answer = await here.ask("GET", path)
    assert answer.status == 200
    assert answer.header("Server") == "llm-gateway"
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Cache-Control") == "no-store"
    head = await here.ask("HEAD", path)
    assert head.status == 200
    assert head.body == b""


async def test_keep_alive_on_both_sides(here: Gateway, upstream: Scripted) -> None:
    async with here.connect() as client:
        for _ in range(20):
            answer = await client.ask("POST", CHAT, chat())
            assert answer.status == 200
            assert answer.header("Connection") is None
        answer = await client.ask("POST", CHAT, chat(), [("Connection", "close")])
        assert answer.header("Connection") == "close"
        assert await client.reader.read() == b""
    assert len(upstream.seen) == 21
    assert here.app.transport.counts(here.app.catalog.upstreams[0]) == (0, 1)


async def test_pipelined_requests_are_answered_in_order(here: Gateway) -> None:
    async with here.connect() as client:
        client.writer.write(request(here) * 3 + request(here, "GET /livez HTTP/1.1"))
        for expected in (b'{"ok":true}', b'{"ok":true}', b'{"ok":true}', b'{"status":"ok"}'):
            answer = await client.rest(await client.head())
            assert answer.body == expected


async def test_an_unread_body_is_not_taken_for_a_request(here: Gateway) -> None:
    """A refusal before the body was read ends the connection: what follows is the body, not a request."""
    smuggled = b"GET /livez HTTP/1.1\r\nHost: gw\r\n\r\n"
    async with here.connect() as client:
        client.send("POST", "/nowhere", None, [("Content-Length", str(len(smuggled) + 10_000))])
        answer = await client.rest(await client.head())
        assert answer.status == 404
        client.writer.write(smuggled)
        async with asyncio.timeout(READ_S):
            with contextlib.suppress(ConnectionError):
                assert b"200" not in await client.reader.read()


# -- curl ---------------------------------------------------------------------------------------------------------


async def test_curl() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here:
        command = ["curl", "-sS", "-N", f"{here.url}{CHAT}", "-H", f"Authorization: Bearer {here.key}"]
        process = await asyncio.create_subprocess_exec(
            *command, "-d", json.dumps(chat(stream=True, max_tokens=4)), stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        assert out.endswith(b"data: [DONE]\n\n")
        large = json.dumps(chat(user="x" * 200_000))  # curl asks for a go-ahead
        process = await asyncio.create_subprocess_exec(
            *command, "-H", "Expect: 100-continue", "--data-binary", "@-",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate(large.encode())
        assert json.loads(out)["object"] == "chat.completion"
