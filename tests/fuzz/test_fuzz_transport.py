"""Fuzz of the upstream transport: however the bytes are cut, the answer is the same; whatever they are, it ends.

The connection is fed directly, without a socket, so that every split point can be tried; the wire underneath is a
stand-in that only notes what it is told. The yardstick is aiohttp's own client reading the same bytes from a socket.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any, NamedTuple

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import UpstreamBroken
from gateway.upstreams.connection import Connection
from gateway.upstreams.transport import Pool
from tests.replay import load
from tests.upstreams.scripted import BODY, OK, Scripted, client, head, read, upstream

POOL = Pool(upstream("http://127.0.0.1:1/v1"), 4.0, None)
FUZZ = settings(
    max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


class Wire:
    """What a transport looks like to the connection; it carries nothing."""

    def __init__(self) -> None:
        self.closing = False

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else None

    def setsockopt(self, *option: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def play(parts: list[bytes], *, attached: bool = False) -> Answer | None:
    """Feed one answer in these parts and then the end of the connection. None: it was broken."""
    wire = Wire()
    connection = Connection(POOL)
    connection.connection_made(wire)  # type: ignore[arg-type]
    reply = connection.begin(head(), BODY)
    POOL.active.add(connection)
    pieces: list[bytes] = []
    if attached:
        reply.attach(pieces.append)
    for part in parts:
        if wire.closing:
            break
        connection.data_received(part)
    if not wire.closing:
        connection.eof_received()
    connection.connection_lost(None)
    assert not POOL.active
    assert not POOL.idle
    error = reply._error
    assert reply.complete is (error is None), "neither whole nor broken: a caller would wait for ever"
    if error is not None:
        assert isinstance(error, UpstreamBroken)
        return None
    headers = [(name, value.strip()) for name, value in reply.head.headers]
    return Answer(reply.status, headers, b"".join(pieces) if attached else reply.body())


def recorded(name: str) -> bytes:
    """A recorded answer as it was on the wire; the chunks, which curl took out, are made anew: one for each line."""
    one = load(name)[0]
    if not one.chunked:
        return one.head + one.body
    chunks = [b"%x\r\n%b\r\n" % (len(line), line) for line in one.body.splitlines(keepends=True)]
    return one.head + b"".join(chunks) + b"0\r\n\r\n"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS: dict[str, bytes] = {
    "length": OK,
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Empty:\r\nX-Space:   \r\n\r\n",
    "chunked": CHUNKED + b'5;a="b"\r\nhello\r\n0007\r\n, world\r\n0;x\r\n\r\n',
    "trailers": CHUNKED + b"3\r\nabc\r\n0\r\nX-T: 1\r\nX-U: 2\r\n\r\n",
    "chunk-looks-like-a-head": CHUNKED + b"%x\r\n" % len(OK) + OK + b"\r\n0\r\n\r\n",
    "until-close": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello\r\n\r\nHTTP/1.1 200 OK\r\n",
    "http-1.0": b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nhello",
    "204": b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK,
    "odd-head": b"HTTP/1.1 200\r\ncontent-length:2\r\nX-Obs: caf\xe9\r\nX-Tab:\ta\tb\r\nX:1\r\nX:2\r\n\r\nhi",
    "vllm-error": recorded("vllm/47-prompt-too-long"),
    "vllm-chat": recorded("vllm/10-chat"),
    "vllm-stream": recorded("vllm/11-chat-stream"),
    "llama-server-chat": recorded("llama-server/10-chat"),
    "llama-server-stream": recorded("llama-server/11-chat-stream"),
    "ollama-stream": recorded("ollama/o10-chat-stream"),
    "ollama-openai-stream": recorded("ollama/11-chat-stream"),
    "litellm-stream": recorded("litellm/11-chat-stream"),
}


async def by_aiohttp(wire: bytes) -> Answer:
    """What aiohttp's client makes of the same bytes, over a socket."""
    async with (
        Scripted([wire, "close"]) as server,
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(f"http://127.0.0.1:{server.port}/", data=BODY) as answer,
    ):
        return Answer(answer.status, list(answer.raw_headers), await answer.read())


@pytest.mark.parametrize("name", ANSWERS)
async def test_cut_in_two_at_every_byte_it_is_what_aiohttp_reads(name: str) -> None:
    wire = ANSWERS[name]
    expected = await by_aiohttp(wire)
    assert play([wire]) == expected
    assert play([wire[at : at + 1] for at in range(len(wire))]) == expected
    assert play([wire[at : at + 1] for at in range(len(wire))], attached=True) == expected
    for at in range(1, len(wire)):
        answer = play([wire[:at], wire[at:]], attached=bool(at & 1))
        assert answer == expected, f"cut at byte {at}"


@pytest.mark.parametrize("name", [name for name, wire in ANSWERS.items() if len(wire) < 1000])
async def test_over_a_socket_too(name: str) -> None:
    """The same in two writes: the loop's reads in place of direct calls."""
    wire = ANSWERS[name]
    expected = await by_aiohttp(wire)
    cuts = range(1, len(wire), max(1, len(wire) // 12))

    async with client() as transport:
        for at in cuts:
            async with Scripted([wire[:at], 0.002, wire[at:], "close"]) as server:
                reply = await asyncio.wait_for(transport.send(server.upstream(), head(), BODY), 2)
                answer = Answer(reply.status, [(k, v.strip()) for k, v in reply.head.headers], await read(reply))
                reply.close()
                assert answer == expected, f"cut at byte {at}"


def cut(wire: bytes, points: list[int]) -> list[bytes]:
    marks = sorted({0, len(wire), *(point % (len(wire) + 1) for point in points)})
    return [wire[start:end] for start, end in pairwise(marks)]


POINTS = st.lists(st.integers(0, 20_000), max_size=30)


@FUZZ
@given(st.sampled_from(sorted(ANSWERS)), POINTS, st.booleans())
def test_any_cutting_gives_the_same(name: str, points: list[int], attached: bool) -> None:
    wire = ANSWERS[name]
    assert play(cut(wire, points), attached=attached) == play([wire])


SPICE = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b";", b"0", b"-1", b"f" * 17, b"\x00", b"\x7f", b"\xff",
    b"0\r\n\r\n", b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"Upgrade: x\r\nConnection: upgrade\r\n",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 2_000), st.integers(0, 4), st.one_of(st.binary(max_size=4), st.sampled_from(SPICE))),
    min_size=1,
    max_size=4,
)


@FUZZ
@given(st.sampled_from([name for name, wire in sorted(ANSWERS.items()) if len(wire) < 2_000]), EDITS, POINTS)
def test_a_damaged_answer_ends_the_same_way_however_it_is_cut(
    name: str, edits: list[tuple[int, int, bytes]], points: list[int]
) -> None:
    """Whole or broken, never pending, no exception; and the same by one read, by many and by single bytes."""
    wire = ANSWERS[name]
    for place, removed, added in edits:
        at = place % (len(wire) + 1)
        wire = wire[:at] + added + wire[at + removed :]
    whole = play([wire])
    assert play(cut(wire, points)) == whole
    assert play([wire[at : at + 1] for at in range(len(wire))], attached=True) == whole


@FUZZ
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(SPICE), st.just(OK)), max_size=12))
def test_garbage_ends(parts: list[bytes]) -> None:
    parts = [part for part in parts if part]
    assert play(parts) == play([b"".join(parts)] if parts else [])
