"""Where an answer ends, over real sockets: RFC 9112 section 6.3, and everything that must not pass for an answer."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import UpstreamBroken
from gateway.upstreams.connection import MAX_HEAD_BYTES
from tests.upstreams.scripted import BODY, OK, Script, Scripted, client, exchange, head, read

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"

#: name: (script, status, body, the connection is used again)
ANSWERS: dict[str, tuple[Script, int, bytes, bool]] = {
    "content-length": ([LENGTH, b"hello"], 200, b"hello", True),
    "content-length-0": ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], 200, b"", True),
    "no-reason": ([b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello"], 200, b"hello", True),
    "chunked": ([CHUNKED, b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"], 200, b"hello", True),
    "chunked-late-end": ([CHUNKED, b"5\r\nhello\r\n", 0.02, b"0\r\n", 0.02, b"\r\n"], 200, b"hello", True),
    "chunk-extensions": ([CHUNKED, b'3;a=b;c\r\nhel\r\n2;q="x"\r\nlo\r\n0;z\r\n\r\n'], 200, b"hello", True),
    "chunk-leading-zeros": ([CHUNKED, b"0005\r\nhello\r\n000\r\n\r\n"], 200, b"hello", True),
    "trailers": ([CHUNKED, b"5\r\nhello\r\n0\r\nX-T: 1\r\nX-U: 2\r\n\r\n"], 200, b"hello", True),
    "chunked-empty": ([CHUNKED, b"0\r\n\r\n"], 200, b"", True),
    "coding-in-capitals": (
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
        200,
        b"hello",
        True,
    ),
    "until-close": ([b"HTTP/1.1 200 OK\r\n\r\nhel", 0.02, b"lo", "close"], 200, b"hello", False),
    "until-close-empty": ([b"HTTP/1.1 200 OK\r\n\r\n", "close"], 200, b"", False),
    "204": ([b"HTTP/1.1 204 No Content\r\n\r\n"], 204, b"", True),
    "204-with-length": ([b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"], 204, b"", True),
    "304": ([b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"], 304, b"", True),
    "100-first": ([b"HTTP/1.1 100 Continue\r\n\r\n", 0.02, LENGTH, b"hello"], 200, b"hello", True),
    "103-first": (
        [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 9\r\n\r\n" + LENGTH + b"hello"],
        200,
        b"hello",
        True,
    ),
    "100-102-103-first": (
        [b"".join(b"HTTP/1.1 %d X\r\nA: b\r\n\r\n" % code for code in (100, 102, 103)), LENGTH, b"hello"],
        200,
        b"hello",
        True,
    ),
    "connection-close": (
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"],
        200,
        b"hello",
        False,
    ),
    "http-1.0": ([b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"], 200, b"hello", False),
    "http-1.0-keep-alive": (
        [b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello"],
        200,
        b"hello",
        True,
    ),
    "http-1.0-until-close": ([b"HTTP/1.0 200 OK\r\n\r\nhello", "close"], 200, b"hello", False),
    "500": ([b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\nhello"], 500, b"hello", True),
    "upgrade-offered": (
        [b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello"],
        200,
        b"hello",
        True,
    ),
    # whole answers with something behind them: ours is delivered, the connection is not trusted again
    "garbage-behind": ([LENGTH + b"hello" + b"garbage"], 200, b"hello", False),
    "garbage-behind-chunked": ([CHUNKED + b"5\r\nhello\r\n0\r\n\r\n" + b"\x00\x01"], 200, b"hello", False),
    "second-answer-behind": ([LENGTH + b"hello" + OK], 200, b"hello", False),
    "part-of-an-answer-behind": ([LENGTH + b"hello" + b"HTT"], 200, b"hello", False),
    "garbage-behind-close": (
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello" + b"garbage"],
        200,
        b"hello",
        False,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_the_body_ends_where_it_ends_and_the_connection_lives_on_only_if_it_may(name: str) -> None:
    script, status, body, reused = ANSWERS[name]
    async with Scripted(script) as server, client() as transport:
        one = server.upstream()
        for _ in range(3):
            assert await exchange(transport, one) == (status, body)
            assert transport.counts(one) == (0, 1 if reused else 0)
        assert server.connections == (1 if reused else 3)
        assert server.requests == [BODY] * 3


async def test_a_stream_is_given_out_with_its_first_byte_and_ends_exactly() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    script = [start, b"9\r\ndata: 1\n\n\r\n", 0.05, b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"]
    async with Scripted(script) as server, client() as transport:
        reply = await transport.send(server.upstream(), head(), BODY)
        assert reply.streaming
        assert not reply.complete
        assert reply.head.content_length is None
        assert (b"Content-Type", b"text/event-stream") in reply.head.headers
        assert await read(reply) == b"data: 1\n\ndata: 2\n\n"
        assert reply.complete


async def test_trailers_and_interim_headers_are_not_headers() -> None:
    script = [
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + CHUNKED + b"5\r\nhello\r\n0\r\nSet-Cookie: a=b\r\n\r\n"
    ]
    async with Scripted(script) as server, client() as transport:
        reply = await transport.send(server.upstream(), head(), BODY)
        assert reply.complete
        assert reply.head.headers == [(b"Transfer-Encoding", b"chunked")]


#: name: what an upstream says that is no answer
MALFORMED: dict[str, bytes] = {
    "length-and-chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked-and-length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "length-twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
    "same-length-twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
    "length-list": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi",
    "length-plus": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nhi",
    "length-minus": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi",
    "length-hex": b"HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\nhi",
    "length-empty": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nhi",
    "length-overflow": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhi",
    "chunked-twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked-identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\nhi",
    "gzip-chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "coding-unknown": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "obs-fold": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nhi",
    "fold-before-first": b"HTTP/1.1 200 OK\r\n X: a\r\nContent-Length: 2\r\n\r\nhi",
    "bare-lf": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    "bare-lf-in-head": b"HTTP/1.1 200 OK\r\nX: a\nContent-Length: 2\r\n\r\nhi",
    "bare-cr-in-head": b"HTTP/1.1 200 OK\r\nX: a\rContent-Length: 2\r\n\r\nhi",
    "bare-lf-in-chunk": CHUNKED + b"2\nhi\r\n0\r\n\r\n",
    "nul-in-value": b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nhi",
    "control-in-value": b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 2\r\n\r\nhi",
    "delete-in-value": b"HTTP/1.1 200 OK\r\nX: a\x7fb\r\nContent-Length: 2\r\n\r\nhi",
    "space-before-colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nhi",
    "control-in-name": b"HTTP/1.1 200 OK\r\nX\x01Y: a\r\nContent-Length: 2\r\n\r\nhi",
    "no-colon": b"HTTP/1.1 200 OK\r\nrubbish\r\nContent-Length: 2\r\n\r\nhi",
    "chunk-size-rubbish": CHUNKED + b"zz\r\nhi\r\n0\r\n\r\n",
    "chunk-size-0x": CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n",
    "chunk-size-negative": CHUNKED + b"-2\r\nhi\r\n0\r\n\r\n",
    "chunk-size-overflow": CHUNKED + b"fffffffffffffffff\r\nhi\r\n0\r\n\r\n",
    "chunk-longer-than-said": CHUNKED + b"2\r\nhi!\r\n0\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + OK,
    "switching-bare": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
    "interim-then-close": b"HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n" + OK,
    "status-099": b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\nhi",
    "status-999": b"HTTP/1.1 999 X\r\nContent-Length: 2\r\n\r\nhi",
    "status-two-digits": b"HTTP/1.1 20 X\r\nContent-Length: 2\r\n\r\nhi",
    "status-letters": b"HTTP/1.1 2x0 X\r\nContent-Length: 2\r\n\r\nhi",
    "a-request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "http-0.9": b"<html>hello</html>",
    "http-2-preface": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80",
    "tls-alert": b"\x15\x03\x01\x00\x02\x02\x16",
    "nothing-but-nul": b"\x00" * 64,
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_answer_is_a_broken_upstream_at_once(name: str) -> None:
    wire = MALFORMED[name]
    async with Scripted(lambda connection, _: [OK] if connection else [wire, "hang"]) as server, client() as transport:
        one = server.upstream()
        with pytest.raises(UpstreamBroken) as raised:
            await asyncio.wait_for(exchange(transport, one), 1)
        assert "'p'" in raised.value.message
        assert raised.value.message.isprintable()  # the parser's words, none of the upstream's bytes
        assert transport.counts(one) == (0, 0)
        assert await exchange(transport, one) == (200, b"{}")  # and life goes on, on a fresh connection
        assert server.connections == 2


@pytest.mark.parametrize(
    ("wire", "what"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Giant: " + b"a" * (MAX_HEAD_BYTES + 1) + b"\r\nContent-Length: 2\r\n\r\nhi", "head"),
        (b"HTTP/1.1 200 OK\r\nX-Endless: " + b"a" * 4 * MAX_HEAD_BYTES, "head"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * 8000, "head"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "head"),
        (b"HTTP/1.1 200 " + b"k" * 4 * MAX_HEAD_BYTES, "head"),
        (b"\r\n" * MAX_HEAD_BYTES, "head"),
        # what comes in one read with the last piece of body, a quarter of a MiB at most, is not counted
        (CHUNKED + b"2\r\nhi\r\n0\r\nX-Endless: " + b"a" * 6 * MAX_HEAD_BYTES, "trailers"),
        (CHUNKED + b"2\r\nhi\r\n0\r\n" + b"X-Many: 1\r\n" * 40000, "trailers"),
        (CHUNKED + b"2\r\nhi\r\n5;" + b"e" * 6 * MAX_HEAD_BYTES, "trailers"),
        (CHUNKED + b"0" * 6 * MAX_HEAD_BYTES, "trailers"),
    ],
    ids=["giant", "endless", "many", "interims", "reason", "lines", "trailer", "trailers", "extension", "zeros"],
)
@pytest.mark.parametrize("pause_s", [None, 0.001])
async def test_heads_and_trailers_have_a_limit_also_when_they_never_end(
    wire: bytes, what: str, pause_s: float | None
) -> None:
    script: list[bytes | float | str] = [wire, "hang"]
    if pause_s is not None:
        script = [part for at in range(0, len(wire), 16384) for part in (wire[at : at + 16384], pause_s)]
        script.append("hang")
    async with Scripted(script) as server, client() as transport:  # type: ignore[arg-type]
        one = server.upstream()
        with pytest.raises(UpstreamBroken, match=f"{what}.* larger than 65536 bytes"):
            await asyncio.wait_for(exchange(transport, one), 2)
        assert transport.counts(one) == (0, 0)


@pytest.mark.parametrize("count", [1, 40])
async def test_a_big_head_under_the_limit_passes_however_much_body_comes_with_it(count: int) -> None:
    fields = b"".join(b"X-%d: %b\r\n" % (at, b"v" * (60_000 // count)) for at in range(count))
    body = b"b" * 300_000
    wire = b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with Scripted([wire]) as server, client() as transport:
        reply = await transport.send(server.upstream(), head(), BODY)
        assert len(reply.head.headers) == count + 1
        assert await read(reply) == body
        reply.close()


async def test_many_small_chunks_are_no_giant_head() -> None:
    piece = b"data: x\n\n"
    script: list[bytes | float] = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
    wire = b"9\r\n" + piece + b"\r\n"
    script += [wire * 1000 + b"9\r", b"\n" + piece + b"\r\n"] * 20
    async with Scripted([*script, b"0\r\n\r\n"]) as server, client() as transport:
        assert await exchange(transport, server.upstream()) == (200, piece * 1001 * 20)


@pytest.mark.parametrize(
    "wire", [b"garbage", OK, b"\r\n", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"]
)
async def test_bytes_nobody_asked_for_close_an_idle_connection(wire: bytes) -> None:
    async with Scripted([OK, 0.03, wire, "hang"]) as server, client() as transport:
        one = server.upstream()
        assert await exchange(transport, one) == (200, b"{}")
        assert transport.counts(one) == (0, 1)
        await asyncio.sleep(0.08)
        assert transport.counts(one) == (0, 0)
        assert server.open == 0
        assert await exchange(transport, one) == (200, b"{}")
        assert server.connections == 2


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("content-length", b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world"),
        ("chunked", CHUNKED + b"5;x=y\r\nhello\r\n7\r\n, world\r\n0\r\nT: 1\r\n\r\n"),
    ],
)
async def test_cut_at_every_byte_it_is_never_whole(name: str, wire: bytes, ending: str) -> None:
    cuts = iter(range(len(wire)))
    cut = 0

    def script(connection: int, turn: int) -> Script:
        return [wire[:cut], 0.0, ending] if cut else [ending]  # type: ignore[list-item]

    async with Scripted(script) as server, client() as transport:
        one = server.upstream()
        for cut in cuts:  # noqa: B007  (the script reads it)
            with pytest.raises(UpstreamBroken):
                await asyncio.wait_for(exchange(transport, one), 1)
        assert transport.counts(one) == (0, 0)
        assert len(server.requests) == len(wire)  # no attempt was repeated: each was on a fresh connection


async def test_an_answer_until_close_is_broken_by_a_reset() -> None:
    async with Scripted([b"HTTP/1.1 200 OK\r\n\r\nhello", 0.03, "reset"]) as server, client() as transport:
        with pytest.raises(UpstreamBroken, match="in the middle"):
            await exchange(transport, server.upstream())


async def test_a_stream_cut_in_the_middle_gives_what_came_and_then_the_error() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with Scripted([start + b"9\r\ndata: 1\n\n\r\n", 0.03, "close"]) as server, client() as transport:
        reply = await transport.send(server.upstream(), head(), BODY)
        pieces: list[bytes] = []
        reply.attach(pieces.append)
        with pytest.raises(UpstreamBroken, match="in the middle"):
            await reply.ended()
        assert pieces == [b"data: 1\n\n"]
        assert not reply.complete


async def test_what_a_sink_raises_comes_out_where_the_end_is_awaited() -> None:
    """On the last piece too, where the answer itself was whole; it is never taken for the upstream's failure."""
    start = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    first = start + b"9\r\ndata: 1\n\n\r\n"
    for rest in ([b"9\r\ndata: 2\n\n\r\n", "hang"], [b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"]):
        async with Scripted([first, 0.03, *rest]) as server, client() as transport:  # type: ignore[list-item]
            one = server.upstream()
            reply = await transport.send(one, head(), BODY)

            def sink(data: bytes) -> None:
                if b"2" in data:
                    raise ZeroDivisionError("in the sink")

            reply.attach(sink)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(reply.ended(), 1)
            assert transport.counts(one) == (0, 0)
