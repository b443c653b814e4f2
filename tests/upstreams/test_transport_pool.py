"""Connections kept and used again, and the ones that died meanwhile: nobody may notice (and nothing is sent thrice)."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
from collections import Counter

import pytest

from gateway.errors import UpstreamBroken, UpstreamUnreachable
from gateway.sim import SimServer
from gateway.upstreams.connection import Connection
from gateway.upstreams.transport import SWEEP_S
from tests.upstreams.scripted import BODY, OK, Script, Scripted, client, exchange, head, until, upstream

SEED = 20
POSTS = 10_000
WORKERS = 8


async def test_connections_that_die_at_random_moments_are_never_noticed() -> None:
    """The server closes: behind its answer, a moment later, on the next request's arrival (FIN or RST)."""
    dice = random.Random(SEED)
    closings = Counter[str]()

    def script(connection: int, turn: int) -> Script | None:
        if turn and dice.random() < 0.2:
            way = dice.choice(["fin", "rst"])
            closings[f"{way} on arrival"] += 1
            return None if way == "fin" else ["reset"]
        roll = dice.random()
        if roll < 0.1:
            closings["behind the answer"] += 1
            return [OK, "close"]
        if roll < 0.2:
            closings["a moment later"] += 1
            return [OK, dice.random() * 0.004, "close"]
        if roll < 0.25:
            closings["reset a moment later"] += 1
            return [OK, dice.random() * 0.004, "reset"]
        return [OK]

    async with Scripted(script) as server, client() as transport:
        one = server.upstream()

        async def worker(first: int) -> None:
            for number in range(first, POSTS, WORKERS):
                body = b"%d" % number
                assert await exchange(transport, one, body) == (200, b"{}"), number
                if number % 7 == 0:
                    await asyncio.sleep(dice.random() * 0.004)

        await asyncio.gather(*(worker(first) for first in range(WORKERS)))
        seen = Counter(server.requests)
        assert len(seen) == POSTS
        assert set(seen.values()) == {1, 2}  # two: on a dead connection, and once again
        twice = sum(1 for count in seen.values() if count == 2)
        assert twice == closings["fin on arrival"] + closings["rst on arrival"]
        assert min(closings.values()) > 20
        assert len(closings) == 5
        assert transport.counts(one)[0] == 0


@pytest.mark.parametrize("idle_s", [0, 0.002])
async def test_the_simulated_engine_that_closes_idle_connections_at_random(idle_s: float) -> None:
    faults = {"close_idle_s": 0} if not idle_s else {"close_idle_random_s": idle_s}
    request = b'{"model":"sim","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}'
    async with SimServer(faults={**faults, "paths": ["/"]}) as sim, client() as transport:
        one = upstream(sim.url)

        async def worker() -> None:
            for _ in range(50):
                status, _ = await exchange(transport, one, request)
                assert status == 200

        await asyncio.gather(*(worker() for _ in range(4)))
        assert 200 <= sim.requests_total <= 400
        assert sim.connections_total > 4  # more than the workers need


async def test_a_resend_happens_once() -> None:
    """Pooled and dead, then fresh and closed without an answer: the second is the upstream's failure."""
    async with (
        Scripted(lambda connection, turn: [OK] if (connection, turn) == (0, 0) else None) as server,
        client() as transport,
    ):
        one = server.upstream()
        await exchange(transport, one)
        with pytest.raises(UpstreamBroken, match="without an answer"):
            await exchange(transport, one)
        assert len(server.requests) == 3
        assert server.connections == 2
        assert transport.counts(one) == (0, 0)


async def test_a_pool_of_dead_connections_costs_one_resend() -> None:
    """The second attempt is dialled: taking another idle connection could find another dead one."""
    async with (
        Scripted(lambda connection, turn: [0.02, OK] if not turn or connection >= 8 else None) as server,
        client() as transport,
    ):
        one = server.upstream()
        await asyncio.gather(*(exchange(transport, one) for _ in range(8)))
        assert transport.counts(one) == (0, 8)
        assert await exchange(transport, one) == (200, b"{}")
        assert len(server.requests) == 10


@pytest.mark.parametrize("bytes_seen", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_no_resend_once_a_byte_has_come(bytes_seen: bytes, ending: str) -> None:
    answer: Script = [bytes_seen, 0.01, ending]  # type: ignore[list-item]
    async with Scripted(lambda connection, turn: answer if turn else [OK]) as server, client() as transport:
        one = server.upstream()
        await exchange(transport, one)
        with pytest.raises(UpstreamBroken, match="in the middle"):
            await exchange(transport, one)
        assert len(server.requests) == 2


@pytest.mark.parametrize("ending", [None, ["reset"]])
async def test_a_fresh_connection_closed_unanswered_is_broken(ending: Script | None) -> None:
    async with Scripted(lambda connection, turn: ending) as server, client() as transport:
        with pytest.raises(UpstreamBroken, match="without an answer"):
            await exchange(transport, server.upstream())
        assert len(server.requests) == 1


async def test_when_the_resend_finds_nobody_it_says_unreachable() -> None:
    async with client() as transport:
        async with Scripted([OK]) as server:
            one = server.upstream()
            await exchange(transport, one)
        with pytest.raises(UpstreamUnreachable, match=r": connection refused$"):
            await exchange(transport, one)
        assert transport.counts(one) == (0, 0)


async def test_a_server_that_hangs_up_on_arrival_never_crashes_the_client() -> None:
    """FIN or RST between the handshake and the first byte written."""

    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    listening = await asyncio.start_server(slam, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with client() as transport:
        one = upstream(f"http://127.0.0.1:{port}/v1")
        for _ in range(50):
            with pytest.raises((UpstreamBroken, UpstreamUnreachable)):
                await exchange(transport, one)
        assert transport.counts(one) == (0, 0)
    listening.close()
    await listening.wait_closed()


async def test_a_connection_lost_before_its_first_request_was_never_reached() -> None:
    """The race itself, made certain: the loop tells of the end before the dialling task runs again."""
    async with Scripted(["hang"]) as server, client() as transport:
        one = server.upstream()
        made = Connection.connection_made

        def lost(self: Connection, wire: asyncio.BaseTransport) -> None:
            made(self, wire)
            wire.abort()  # type: ignore[attr-defined]

        Connection.connection_made = lost  # type: ignore[method-assign]
        try:
            with pytest.raises(UpstreamUnreachable, match="closed the connection at once"):
                await exchange(transport, one)
        finally:
            Connection.connection_made = made  # type: ignore[method-assign]
        assert server.requests == []
        assert transport.counts(one) == (0, 0)


async def test_nobody_listens_and_names_that_do_not_exist() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with client() as transport:
            for host, words in [
                ("127.0.0.1", ": connection refused$"),
                ("a" * 64 + ".invalid", "label|too long|not known|encod"),
            ]:
                one = upstream(f"http://{host}:{port}/v1", connect_s=2.0)
                with pytest.raises(UpstreamUnreachable, match=words) as raised:
                    await exchange(transport, one)
                assert not raised.value.sent
                assert "'p'" in raised.value.message


async def test_the_most_recently_used_connection_is_taken_and_old_ones_are_closed_in_time() -> None:
    async with Scripted([0.02, OK]) as server, client(idle_s=0.3) as transport:
        one = server.upstream()
        await asyncio.gather(*(exchange(transport, one) for _ in range(4)))
        assert transport.counts(one) == (0, 4)
        for _ in range(8):
            await asyncio.sleep(0.05)
            await exchange(transport, one)
        assert server.connections == 4
        assert transport.counts(one) == (0, 1)  # the three that were not used again are gone
        await until(lambda: server.open == 1)
        await until(lambda: transport.counts(one) == (0, 0) and server.open == 0, 0.45)


async def test_a_connection_past_its_time_is_not_taken_even_before_the_sweep() -> None:
    async with Scripted([OK]) as server, client() as transport:
        one = server.upstream()
        await exchange(transport, one)
        (connection,) = transport._pools[one].idle
        connection.idle_at -= 10
        await exchange(transport, one)
        assert server.connections == 2


async def test_an_answer_before_the_request_was_read_is_delivered_and_its_connection_not_used_again() -> None:
    """413 and the like: what is left of the upload must not be followed by another request."""
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}"
    async with Scripted([early], read=False) as server, client() as transport:
        one = server.upstream()
        for _ in range(3):
            assert await exchange(transport, one, b"x" * 20_000_000) == (413, b"{}")
            assert transport.counts(one) == (0, 0)
        assert server.connections == 3


@pytest.mark.parametrize(
    ("answer", "whole"),
    [(b"HTTP/1.1 413 Too Large\r\n\r\n{}", True), (b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\n{}", False)],
)
async def test_an_early_answer_that_ends_with_the_connection_does_not_wait_for_the_upload(
    answer: bytes, whole: bool
) -> None:
    """The server shuts its side and reads nothing: its end counts now, not when the upload has drained."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(answer)
        writer.write_eof()
        await done.wait()
        writer.transport.abort()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with client() as transport:
        one = upstream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")
        sending = asyncio.wait_for(exchange(transport, one, b"x" * 20_000_000), 2)
        if whole:
            assert await sending == (413, b"{}")
        else:
            with pytest.raises(UpstreamBroken, match="in the middle"):
                await sending
        assert transport.counts(one) == (0, 0)
    done.set()
    listening.close()
    await listening.wait_closed()
    await asyncio.sleep(0.02)


async def test_a_connection_whose_reading_was_paused_reads_again_in_the_pool() -> None:
    """Paused on the last piece: were it kept so, its close would go unseen, and its next answer unread."""
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with (
        Scripted([stream, b"9\r\ndata: 1\n\n\r\n", 0.02, b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"]) as server,
        client() as transport,
    ):
        one = server.upstream()
        for _ in range(3):
            reply = await transport.send(one, head(), BODY)
            pieces: list[bytes] = []

            def sink(data: bytes, pieces: list[bytes] = pieces, reply: object = reply) -> None:
                pieces.append(data)
                if b"2" in data:
                    reply.pause()  # type: ignore[attr-defined]

            reply.attach(sink)
            await reply.ended()
            reply.resume()  # the client reads again, too late to matter
            reply.close()
            assert b"".join(pieces) == b"data: 1\n\ndata: 2\n\n"
        assert server.connections == 1
        assert transport.counts(one) == (0, 1)


async def test_requests_side_by_side_never_share_a_connection() -> None:
    """Each answer goes to its own asker: the server echoes, late and out of order."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(4)
                await asyncio.sleep(random.random() * 0.01)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with client() as transport:
        one = upstream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")

        async def ask(number: int) -> None:
            for turn in range(10):
                body = b"%02d%02d" % (number, turn)
                assert await exchange(transport, one, body) == (200, body)

        await asyncio.gather(*(ask(number) for number in range(30)))
        active, idle = transport.counts(one)
        assert active == 0
        assert 0 < idle <= 30
    listening.close()
    await listening.wait_closed()
    await asyncio.sleep(0.02)


async def test_a_closed_connection_leaves_no_reference_cycle() -> None:
    """The parser holds the connection's methods: a cycle that only the collector would free, for each connection."""

    def alive() -> int:
        return sum(isinstance(one, Connection) for one in gc.get_objects())

    gc.collect()
    before = alive()
    async with (
        Scripted([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"]) as server,
        client() as transport,
    ):
        one = server.upstream()
        gc.disable()
        try:
            for _ in range(20):
                await exchange(transport, one)
            await asyncio.sleep(0.05)
            assert alive() - before <= 1
        finally:
            gc.enable()


async def test_many_idle_connections_that_die_together_do_not_hold_up_the_loop() -> None:
    async with Scripted([0.1, OK, 0.1, "close"]) as server, client() as transport:
        one = server.upstream()
        await asyncio.gather(*(exchange(transport, one) for _ in range(200)))
        assert transport.counts(one) == (0, 200)
        await until(lambda: transport.counts(one) == (0, 0), 1.0)
        assert server.connections == 200


async def test_the_pool_of_a_retired_upstream_stays_while_it_is_dialled() -> None:
    """Else nobody would look after the connection that comes about: no deadline, no end with the gateway's."""
    async with Scripted(["hang"], read=False) as server, client() as transport:
        one = upstream(f"https://127.0.0.1:{server.port}/v1")  # its handshake goes unanswered
        asking = asyncio.create_task(exchange(transport, one))
        await until(lambda: one.dialling == 1)
        one.retired = True
        await asyncio.sleep(4 * SWEEP_S)
        assert one in transport._pools
        asking.cancel()
        await until(lambda: one not in transport._pools)
