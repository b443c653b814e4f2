"""The four timeouts: each fires within 100 ms after its time, and never before it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import pytest

from gateway.errors import UpstreamBroken, UpstreamGivenUp, UpstreamTimeout, UpstreamUnreachable
from gateway.upstreams.reply import Reply
from tests.upstreams.scripted import BODY, OK, Script, Scripted, client, exchange, head, lateness, read, until, upstream

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
LIMIT_S = 0.2
LATE_S = 0.1
#: uvloop keeps its timers in whole milliseconds of a clock that it reads once a turn
EARLY_S = 0.003


def moved(reply: Reply) -> None:
    """What a sink says of a piece that is a sign of life."""
    reply.moved_at = monotonic()


async def on_time(error: type[Exception], code: str, fail: Callable[[], Awaitable[object]], limit_s: float) -> None:
    """`fail` must raise after `limit_s`, at most LATE_S late, and what all timers were late."""
    async with lateness() as late_s:
        began_at = monotonic()
        with pytest.raises(error) as raised:
            await fail()
        took_s = monotonic() - began_at
        assert getattr(raised.value, "code", "") == code
        assert getattr(raised.value, "status", 0) == 504
        assert limit_s - EARLY_S <= took_s <= limit_s + LATE_S + 2 * late_s()


@contextmanager
def black_hole() -> Iterator[int]:
    """A port whose queue of connections is full: the kernel drops every further SYN."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        try:
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


async def test_connect() -> None:
    with black_hole() as port:
        async with client() as transport:
            one = upstream(f"http://127.0.0.1:{port}/v1", connect_s=LIMIT_S)
            await on_time(UpstreamUnreachable, "upstream_connect_timeout", lambda: exchange(transport, one), LIMIT_S)
            assert transport.counts(one) == (0, 0)


SILENCES: dict[str, Script] = {
    "silent": ["hang"],
    "head only": [HEAD, "hang"],
    "stream's head only": [STREAM, "hang"],
    "half a head": [HEAD[:20], "hang"],
    "interim only": [b"HTTP/1.1 100 Continue\r\n\r\n", "hang"],
    "heads in drops": [part for at in range(len(HEAD)) for part in (HEAD[at : at + 1], 0.05)],
}


@pytest.mark.parametrize("name", SILENCES)
async def test_first_byte(name: str) -> None:
    async with Scripted(SILENCES[name]) as server, client() as transport:
        one = server.upstream(first_byte_s=LIMIT_S, idle_s=0.02, total_s=5.0)
        await on_time(UpstreamTimeout, "upstream_first_byte_timeout", lambda: exchange(transport, one), LIMIT_S)
        assert transport.counts(one) == (0, 0)
        await until(lambda: server.open == 0)


@pytest.mark.parametrize(
    "script",
    [
        [HEAD, b"hel", "hang"],
        [STREAM, b"9\r\ndata: 1\n\n\r\n", "hang"],
        [b"HTTP/1.1 200 OK\r\n\r\nhel", "hang"],
        [STREAM, b"9\r\ndata: 1\n\n\r\n", b"8\r\ndata:", "hang"],
    ],
    ids=["gathered", "stream", "until close", "in an event"],
)
async def test_idle(script: Script) -> None:
    async with Scripted(script) as server, client() as transport:
        one = server.upstream(first_byte_s=5.0, idle_s=LIMIT_S)
        await on_time(UpstreamTimeout, "upstream_idle_timeout", lambda: exchange(transport, one), LIMIT_S)
        assert transport.counts(one) == (0, 0)


async def test_idle_starts_anew_only_when_the_caller_says_so() -> None:
    """Comments are bytes, and no progress: the sink judges."""
    script: Script = [STREAM, b"9\r\ndata: 1\n\n\r\n", *[0.05, b"6\r\n: ping\r\n"] * 40, "hang"]
    async with Scripted(script) as server, client() as transport:

        async def listen() -> None:
            reply = await transport.send(server.upstream(idle_s=LIMIT_S), head(), BODY)
            try:
                reply.attach(lambda data: None if data.startswith(b":") else moved(reply))
                await reply.ended()
            finally:
                reply.close()

        await on_time(UpstreamTimeout, "upstream_idle_timeout", listen, LIMIT_S)

        reply = await transport.send(server.upstream(idle_s=LIMIT_S), head(), BODY)
        reply.attach(lambda data: moved(reply))
        with pytest.raises(TimeoutError):  # the test's own patience: the upstream's idleness never came
            await asyncio.wait_for(reply.ended(), 1.0)
        reply.close()


@pytest.mark.parametrize(
    "script",
    [
        ["hang"],
        [HEAD, "hang"],
        [STREAM, *[b"9\r\ndata: 1\n\n\r\n", 0.03] * 40, "hang"],
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x", 0.03] * 40, "hang"],
    ],
    ids=["silent", "head only", "stream", "gathered"],
)
async def test_total(script: Script) -> None:
    async with Scripted(script) as server, client() as transport:
        one = server.upstream(first_byte_s=5.0, idle_s=5.0, total_s=LIMIT_S)
        await on_time(UpstreamTimeout, "upstream_total_timeout", lambda: exchange(transport, one), LIMIT_S)
        assert transport.counts(one) == (0, 0)


async def test_a_client_that_does_not_read_is_not_the_upstreams_idleness() -> None:
    script: Script = [STREAM, b"9\r\ndata: 1\n\n\r\n", 0.02, b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"]
    async with Scripted(script) as server, client() as transport:
        reply = await transport.send(server.upstream(idle_s=0.1), head(), BODY)
        pieces: list[bytes] = []
        reply.attach(pieces.append)
        reply.pause()
        moved(reply)  # what was read before the pause took effect
        await asyncio.sleep(0.4)
        assert pieces == [b"data: 1\n\n"]
        reply.resume()
        await reply.ended()
        assert pieces == [b"data: 1\n\n", b"data: 2\n\n"]


async def test_after_the_pause_the_idle_time_runs_again() -> None:
    async with Scripted([STREAM, b"9\r\ndata: 1\n\n\r\n", "hang"]) as server, client() as transport:

        async def listen() -> None:
            reply = await transport.send(server.upstream(idle_s=LIMIT_S), head(), BODY)
            reply.pause()
            asyncio.get_running_loop().call_later(LIMIT_S, reply.resume)
            await read(reply)

        await on_time(UpstreamTimeout, "upstream_idle_timeout", listen, LIMIT_S)


async def test_a_paused_reply_still_has_its_total_time() -> None:
    async with Scripted([STREAM, b"9\r\ndata: 1\n\n\r\n", "hang"]) as server, client() as transport:

        async def listen() -> None:
            reply = await transport.send(server.upstream(idle_s=0.05, total_s=LIMIT_S), head(), BODY)
            reply.attach(lambda data: None)
            reply.pause()
            await reply.ended()

        await on_time(UpstreamTimeout, "upstream_total_timeout", listen, LIMIT_S)


async def test_none_switches_a_timeout_off() -> None:
    slow: Script = [0.15, STREAM, 0.15, b"9\r\ndata: 1\n\n\r\n", 0.15, b"0\r\n\r\n"]
    async with Scripted(slow) as server, client() as transport:
        one = server.upstream(first_byte_s=None, idle_s=None, total_s=None)
        assert await exchange(transport, one) == (200, b"data: 1\n\n")


async def test_limits_changed_while_an_exchange_runs_are_for_the_next_one() -> None:
    """The sweep reports the limit that the exchange began with; it must also outlive a limit that is gone."""
    async with Scripted(["hang"]) as server, client() as transport:
        one = server.upstream(first_byte_s=LIMIT_S)
        waiting = asyncio.create_task(exchange(transport, one))
        await asyncio.sleep(0.05)
        one.timeouts = upstream("http://x", first_byte_s=None).timeouts
        with pytest.raises(UpstreamTimeout, match=r"within 0\.2 s"):
            await asyncio.wait_for(waiting, 1)


async def test_every_expired_reply_is_found_in_one_sweep() -> None:
    async with Scripted(["hang"]) as server, client() as transport:
        one = server.upstream(first_byte_s=LIMIT_S)
        found = await asyncio.gather(*(exchange(transport, one) for _ in range(50)), return_exceptions=True)
        assert [type(error) for error in found] == [UpstreamTimeout] * 50
        assert transport.counts(one) == (0, 0)


async def test_closing_the_transport_ends_every_exchange() -> None:
    async with Scripted(lambda connection, turn: ["hang"] if turn or connection else [OK]) as server:
        async with client() as transport:
            one = server.upstream()
            assert await exchange(transport, one) == (200, b"{}")
            waiting = [asyncio.create_task(exchange(transport, one)) for _ in range(3)]
            await asyncio.sleep(0.05)
            transport.close()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [str(error) for error in found] == ["the gateway is shutting down"] * 3
            assert all(isinstance(error, UpstreamBroken) for error in found)
            with pytest.raises(UpstreamGivenUp, match="shutting down"):
                await exchange(transport, one)
            assert transport.counts(one) == (0, 0)
        await asyncio.sleep(0.02)
        assert server.open == 0


async def test_an_upstream_that_says_nothing_is_told_of() -> None:
    silent: list[str] = []
    async with Scripted(["hang"]) as server, client() as transport:
        transport.on_silent = lambda one: silent.append(one.name)
        task = asyncio.create_task(transport.send(server.upstream(), head(), BODY))
        await asyncio.sleep(0.5)
        assert not silent
        await asyncio.sleep(1.5)
        assert silent
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        silent.clear()
        await asyncio.sleep(0.3)
        assert not silent, "nobody waits for it"
