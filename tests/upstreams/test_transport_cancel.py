"""Cancel in every phase and look for what is left: sockets on both sides, counters, tasks, connections."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from gateway.upstreams.reply import Reply
from gateway.upstreams.transport import Transport
from gateway.upstreams.upstream import Upstream
from tests.upstreams.scripted import BODY, OK, Script, Scripted, client, exchange, head, until

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"9\r\ndata: 1\n\n\r\n"
CANCELS = 1_000
SEED = 20

#: name: what the server does while the request is cancelled
PHASES: dict[str, Script] = {
    "waiting for the head": ["hang"],
    "in the head": [STREAM[:30], "hang"],
    "waiting for the first byte": [STREAM, "hang"],
    "gathering": [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhel", "hang"],
    "in the stream": [STREAM, EVENT, "hang"],
    "in the stream, busy": [STREAM, EVENT, *[EVENT, 0.001] * 300],
    "until close": [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n", "hang"],
}


def sockets() -> int:
    return len([one for one in psutil.Process(os.getpid()).net_connections() if one.status != "LISTEN"])


async def use(transport: Transport, one: Upstream, *, paused: bool = False, body: bytes = BODY) -> bytes:
    """What the gateway does with a reply."""
    reply = await transport.send(one, head(len(body)), body)
    try:
        if reply.complete:
            return reply.body()
        pieces: list[bytes] = []
        reply.attach(pieces.append)
        if paused:
            reply.pause()
        await reply.ended()
        return b"".join(pieces)
    finally:
        reply.close()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", PHASES)
async def test_cancelled_in_a_phase_the_upstream_sees_it_at_once(name: str, pooled: bool, paused: bool) -> None:
    script = PHASES[name]
    async with Scripted(lambda _, turn: [OK] if pooled and not turn else script) as server, client() as transport:
        one = server.upstream()
        if pooled:
            await exchange(transport, one)
        task = asyncio.create_task(use(transport, one, paused=paused))
        await until(lambda: len(server.requests) == 1 + pooled, 1.0)
        await asyncio.sleep(0.01)
        assert transport.counts(one) == (1, 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transport.counts(one) == (0, 0)
        await until(lambda: server.open == 0)
        assert server.connections == 1


async def test_cancelled_while_an_upload_is_stuck() -> None:
    """What was not written yet is dropped: the close does not wait for it."""
    async with Scripted([1.0, OK], read=False) as server, client() as transport:
        one = server.upstream()
        before = sockets()
        task = asyncio.create_task(use(transport, one, body=b"x" * 30_000_000))
        await asyncio.sleep(0.05)
        assert sockets() == before + 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: sockets() <= before + 1)  # ours; the server's end waits for its script
        assert transport.counts(one) == (0, 0)


async def test_cancelled_while_a_dead_pooled_connection_is_replaced() -> None:
    async with Scripted(lambda _, turn: None if turn else [OK]) as server, client() as transport:
        one = server.upstream()
        for turns in range(12):
            await exchange(transport, one)
            task = asyncio.create_task(use(transport, one))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert transport.counts(one)[0] == 0
        transport.close()
        await until(lambda: server.open == 0)


async def test_a_thousand_random_cancels_leave_nothing() -> None:
    """Delays from before the dial to after the end, side by side, over every phase and over answers that complete."""
    dice = random.Random(SEED)
    scripts: list[Script] = [*PHASES.values(), [OK], [0.005, OK], [STREAM, EVENT, 0.004, b"0\r\n\r\n"], ["close"]]
    outcomes = Counter[str]()
    seen: list[BaseException] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: seen.append(context.get("exception") or ValueError(context)))

    async with Scripted(lambda _, __: dice.choice(scripts)) as server, client(idle_s=0.6) as transport:
        one = server.upstream()
        gc.collect()
        sockets_before = sockets()
        tasks_before = len(asyncio.all_tasks())

        async def worker(rounds: int) -> None:
            for _ in range(rounds):
                task = asyncio.create_task(use(transport, one, paused=dice.random() < 0.2))
                delay = dice.choice(["turns", "little", "more"])
                if delay == "turns":
                    for _ in range(dice.randrange(8)):
                        await asyncio.sleep(0)
                elif delay == "little":
                    await asyncio.sleep(dice.random() * 0.003)
                else:  # in turns, which a busy machine makes longer, as it does answers
                    for _ in range(dice.randrange(8)):
                        await asyncio.sleep(0.002)
                task.cancel()
                (result,) = await asyncio.gather(task, return_exceptions=True)
                outcomes[type(result).__name__] += 1

        await asyncio.gather(*(worker(CANCELS // 20) for _ in range(20)))
        active, idle = transport.counts(one)
        assert active == 0
        await until(lambda: server.open <= idle)
        await until(lambda: transport.counts(one) == (0, 0) and server.open == 0, 2.0)  # the idle ones, in time
        gc.collect()
        await until(lambda: sockets() <= sockets_before)  # the server's own ends close a turn after it counts them
        assert len(asyncio.all_tasks()) == tasks_before
        assert not [found for found in gc.get_objects() if isinstance(found, Reply) and not found.complete]
    assert seen == []
    assert sum(outcomes.values()) == CANCELS
    assert outcomes["CancelledError"] > CANCELS / 3
    assert outcomes["bytes"] > 20, outcomes
    assert set(outcomes) <= {"CancelledError", "bytes", "UpstreamBroken", "UpstreamSilent"}


@pytest.mark.parametrize("when", ["before", "after"])
async def test_cancelled_in_the_same_turn_as_the_answer(when: str) -> None:
    """The answer and the cancellation meet: either way the connection is whole, and nothing waits."""
    async with Scripted([0.01, OK]) as server, client() as transport:
        one = server.upstream()
        finish = Reply.finish

        def finished(self: Reply) -> None:
            steps: list[Callable[[], object]] = [task.cancel, lambda: finish(self)]
            for step in steps if when == "before" else reversed(steps):
                step()

        Reply.finish = finished  # type: ignore[method-assign]
        try:
            task = asyncio.create_task(use(transport, one))
            await asyncio.gather(task, return_exceptions=True)
        finally:
            Reply.finish = finish  # type: ignore[method-assign]
        assert transport.counts(one) == (0, 1)
        assert await exchange(transport, one) == (200, b"{}")
        assert server.connections == 1


async def test_closed_by_its_caller_in_the_middle_of_a_sink() -> None:
    async with Scripted([STREAM, EVENT, 0.01, EVENT, EVENT, "hang"]) as server, client() as transport:
        one = server.upstream()
        reply = await transport.send(one, head(), BODY)
        calls: list[bytes] = []

        def sink(data: bytes) -> None:
            calls.append(data)
            if len(calls) == 2:
                reply.close()

        reply.attach(sink)
        await until(lambda: server.open == 0)
        assert len(calls) == 2
        assert transport.counts(one) == (0, 0)
        reply.close()
        reply.pause()
        reply.resume()
