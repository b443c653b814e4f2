"""Header rules in both directions, and request targets."""

from __future__ import annotations

import pytest

from gateway.errors import BadRequest, UpstreamBroken
from gateway.wire.headers import (
    REQUEST_PASS,
    raw_target_problem,
    request_headers,
    response_headers,
)
from tests.transcripts import load, streams

OURS = b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"


def test_request_headers_pass_by_allow_list() -> None:
    given = [
        (b"Host", b"gateway"),
        (b"ACCEPT", b"text/event-stream"),
        (b"Authorization", b"Bearer secret"),
        (b"x-api-key", b"secret"),
        (b"Cookie", b"a=b"),
        (b"X-Forwarded-For", b"1.2.3.4"),
        (b"Forwarded", b"for=1.2.3.4"),
        (b"Origin", b"https://evil.example"),
        (b"Connection", b"close"),
        (b"Content-Encoding", b"gzip"),
        (b"Content-Length", b"3"),
        (b"Transfer-Encoding", b"chunked"),
        (b"traceparent", b"00-1-2-01"),
        (b"Anthropic-Version", b"2023-06-01"),
        (b"X-Custom", b"1"),
    ]
    assert request_headers(given) == [
        (b"accept", b"text/event-stream"),
        (b"traceparent", b"00-1-2-01"),
        (b"anthropic-version", b"2023-06-01"),
    ]
    never = {"authorization", "cookie", "host", "origin", "connection", "content-encoding", "x-api-key", "te"}
    assert not REQUEST_PASS & never
    assert not [name for name in REQUEST_PASS if "forward" in name or name != name.lower()]


@pytest.mark.parametrize(
    "item", [(b"Content_Length", b"1"), (b"x_y", b""), (b"accept", b"a\r\nX: y"), (b"accept", b"\0")]
)
def test_request_headers_refused(item: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadRequest):
        request_headers([(b"accept", b"*/*"), item])


def test_response_headers() -> None:
    pairs = [
        (b"Date", b"Mon, 23 Nov 2026 05:05:15 GMT"),
        (b"Server", b"uvicorn"),
        (b"SERVER", b"uvicorn"),
        (b"content-type", b"application/json"),
        (b"Content-Length", b"12"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"close, X-Secret-Hop"),
        (b"x-secret-hop", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Set-Cookie", b"a=b"),
        (b"Access-Control-Allow-Origin", b""),
        (b"access-control-anything-new", b"*"),
        (b"X-LiteLLM-Model-Api-Base", b"http://10.0.0.1"),
        (b"llm_provider-server", b"llama.cpp"),
        (b"x-ratelimit-limit-requests", b"5"),
        (b"X-Request-Id", b"theirs"),
        (b"Alt-Svc", b"h3"),
        (b"Strict-Transport-Security", b"max-age=1"),
        (b"Cache-Control", b"public, max-age=60"),
        (b"X-Content-Type-Options", b"sniff"),
        (b"Location", b"http://10.0.0.1/"),
        (b"Content-Encoding", b"identity"),
        (b"X-Model-Load-S", b"1.5"),
        (b"openai-processing-ms", b"17"),
        (b"Latin", b"caf\xe9"),
    ]
    assert response_headers(pairs) == (
        b"Date: Mon, 23 Nov 2026 05:05:15 GMT\r\ncontent-type: application/json\r\nX-Model-Load-S: 1.5\r\n"
        b"openai-processing-ms: 17\r\nLatin: caf\xe9\r\n" + OURS
    )
    assert response_headers([]) == OURS


def test_connection_names_headers_before_it_too() -> None:
    assert response_headers([(b"x-a", b"1"), (b"connection", b"X-A, date"), (b"date", b"d")]) == OURS
    both = [(b"x-a", b"1"), (b"Connection", b"x-a"), (b"CONNECTION", b"x-b"), (b"x-b", b"1"), (b"x-c", b"1")]
    assert response_headers(both) == b"x-c: 1\r\n" + OURS


@pytest.mark.parametrize("pair", [(b"Content-Encoding", b"gzip"), (b"content-encoding", b"identity, br")])
def test_an_encoding_nobody_asked_for_is_refused(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(UpstreamBroken, match="compressed"):
        response_headers([pair])


@pytest.mark.parametrize(
    "pair",
    [
        (b"x-a", b"1\r\nSet-Cookie: a=b"),
        (b"x-a", b"\0"),
        (b"x-a", b"\x7f"),
        (b"date", b"1\n"),
        (b"x a", b"1"),
        (b"x-a:", b"1"),
        (b"", b"1"),
        (b"x-a\r\n", b"1"),
        (b"x-a", b"1" * 70_000),
    ],
)
def test_hostile_response_headers(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(UpstreamBroken):
        response_headers([(b"date", b"now"), pair])


@pytest.mark.parametrize(("runtime", "name"), streams())
def test_recorded_heads_leak_nothing(runtime: str, name: str) -> None:
    lines = response_headers(load(runtime, name).headers).decode().lower()
    for word in (
        "server:",
        "litellm",
        "llm_provider",
        "access-control",
        "transfer-encoding",
        "keep-alive",
        "127.0.0.1",
    ):
        assert word not in lines
    assert "content-type: " in lines
    assert lines.endswith(OURS.decode().lower())


@pytest.mark.parametrize(
    "target",
    [
        "/", "/v1/chat/completions", "/v1/models/smol:latest", "/api/tags?x=1", "/v1/models/a.b..c", "/v1/..x",
        "/v1/models/x?path=/../%2e%2f//\\", "/a%20b", "/v1/models/caf%C3%A9", "/.well-known/x",
    ],
)  # fmt: skip
def test_good_targets(target: str) -> None:
    assert raw_target_problem(target) is None
    assert raw_target_problem(target.encode()) is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/v1/../admin", "dot"), ("/./x", "dot"), ("/x/..", "dot"), ("/x/.", "dot"), ("/..", "dot"),
        ("/v1/%2e%2e/x", "dot"), ("/v1/%2E", "dot"), ("/.%2e/", "dot"),
        ("//evil.example/x", "empty segment"), ("/a//b", "empty segment"), ("/a%2fb", "slash"), ("/a%2Fb", "slash"),
        ("/a\\b", "backslash"), ("/a%5cb", "backslash"), ("/a%5Cb", "backslash"),
        ("/a\tb", "control"), ("/a\x00", "control"), ("/a\x7f", "control"), ("/a b", "control"), ("/a%00", "control"),
        ("/a%0d%0aX", "control"), ("/é", "control"), ("/\udcff", "control"), ("/a?x=\n", "control"),
        ("/a?\x80", "control"),
        ("/v1/models\n", "control"), ("/a#b", "fragment"), ("/a?b#c", "fragment"),
        ("", "begin"), ("*", "begin"), ("v1/models", "begin"), ("?x", "begin"), ("example.com:443", "begin"),
        ("http:///x", "begin"), ("ftp://gw/x", "begin"), ("http://evil/x", "authority"),
        ("http://user@gw/x", "authority"), ("http://gw/../x", "dot"), ("http://gw//x", "slash"),
    ],
)  # fmt: skip
def test_bad_targets(target: str, words: str) -> None:
    problem = raw_target_problem(target, "gw")
    assert problem is not None
    assert words in problem
    assert raw_target_problem(target.encode("utf-8", "surrogateescape"), b"gw") == problem


def test_absolute_form_only_for_the_host() -> None:
    assert raw_target_problem("http://gw:8700/v1/models?x=1", "GW:8700") is None
    assert raw_target_problem("HTTPS://gw/v1/models", "gw") is None
    assert raw_target_problem("http://gw/v1/models") == "its authority is not the Host"
