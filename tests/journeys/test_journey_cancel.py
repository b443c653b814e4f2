"""A client that leaves takes its upstream work with it, at once and without a trace."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.web import BaseRequest

from gateway.server import ClientProtocol
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, Gateway, chat, deaf, gateway, provider, until

BOTH_LOOPS = True

SOON_S = 0.1

#: how far the request has come when its client leaves -> its body and the engine's faults
PHASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "waiting for headers": (chat(stream=True), {"slow_headers_s": 30.0}),
    "before the first token": (chat(stream=True), {"first_token_s": 30.0}),
    "mid-stream": (chat(stream=True, max_tokens=5000), {"token_s": 0.01}),
    "stalled": (chat(stream=True, max_tokens=50), {"stall_at_token": 6}),
    "unstreamed": (chat(max_tokens=5000), {"token_s": 0.01}),
}


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer() as one:
        yield one


async def begun(here: Gateway, sim: SimServer, phase: str) -> Client:
    """A client whose request has come as far as the phase says."""
    body, faults = PHASES[phase]
    sim.faults = faults
    client = await Client.open(here.port, here.key)
    posts = len(posted(sim))
    client.send("POST", CHAT, body)
    await until(lambda: len(posted(sim)) > posts, what="the request at the upstream")
    if phase in ("mid-stream", "stalled"):
        await client.head()
        await client.events(3)
    elif phase in ("before the first token", "unstreamed"):
        await until(lambda: sim.engine.running == 1, what="a running generation")
    return client


def posted(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


@pytest.mark.parametrize("how", ["leave", "reset"])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_upstream_is_let_go_at_once(sim: SimServer, phase: str, how: str) -> None:
    taken = []
    async with gateway(provider("one", sim.url)) as here:
        for turn in range(3):
            client = await begun(here, sim, phase)
            getattr(client, how)()
            taken.append(await until(lambda: posted(sim)[-1].closed_at is not None, what="upstream closed"))
            await here.settled(turn + 1)
            here.assert_idle()
            assert sim.engine.running == 0
            record = here.record
            assert (record.status, record.outcome) == (499, "client_gone")
            assert (record.provider, record.model, record.error) == ("one", "sim", None)
            if phase in ("mid-stream", "stalled"):
                assert record.estimated
                assert record.completion_tokens is not None
                assert 2 <= record.completion_tokens <= 30
                assert record.prompt_tokens
    # the middle one of three: a busy machine may hold up one of them
    assert statistics.median(taken) < SOON_S, taken


@pytest.mark.asyncio(loop_factories=["uvloop"])  # slow
async def test_a_client_that_leaves_while_the_gateway_connects() -> None:
    with deaf() as port:
        async with gateway(provider("one", f"http://127.0.0.1:{port}/v1")) as here:
            client = await Client.open(here.port, here.key)
            client.send("POST", CHAT, chat())
            await until(lambda: here.app.catalog.upstreams[0].in_flight == 1, what="a lease")
            client.leave()
            assert await until(lambda: here.app.catalog.upstreams[0].in_flight == 0, what="the lease dropped") < 1
            await here.settled(1)
            here.assert_idle()
            assert (here.record.status, here.record.outcome) == (499, "client_gone")


async def test_a_client_that_leaves_while_it_sends(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        client = await Client.open(here.port, here.key)
        client.send("POST", CHAT, None, [("Content-Length", "99")])
        client.writer.write(b'{"model":')
        await until(lambda: here.app.in_flight() == 1, what="a request in flight")
        client.leave()
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        assert here.record.outcome == "client_gone"
        assert not posted(sim)


async def test_nothing_leaks_in_500_cancels_at_random_times(sim: SimServer) -> None:
    dice = random.Random(8)
    count = 500
    async with gateway(provider("one", sim.url), provider("two", sim.url)) as here:
        seats = asyncio.Semaphore(25)

        async def one() -> None:
            async with seats:
                stream = dice.random() < 0.7
                sim.faults = dice.choice([{}, {"token_s": 0.002}, {"slow_headers_s": 0.02}, {"chunk": 7}])
                client = await Client.open(here.port, here.key)
                client.send("POST", CHAT, chat(stream=stream, max_tokens=dice.choice([1, 8, 400])))
                await asyncio.sleep(dice.random() ** 2 * 0.05)
                if dice.random() < 0.2:
                    await asyncio.wait_for(client.head(), 10)
                (client.reset if dice.random() < 0.5 else client.leave)()

        await asyncio.gather(*(one() for _ in range(count)))
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        await until(lambda: sim.engine.running == 0, what="nothing running")
        here.assert_idle()
        records = here.records
        assert len(records) <= count
        outcomes = {record.outcome for record in records}
        assert outcomes <= {"ok", "client_gone"}, outcomes
        gone = [record for record in records if record.outcome == "client_gone"]
        assert len(gone) > count / 4, "most of them were cut short"
        assert {record.status for record in gone} == {499}
        # and it serves as before
        sim.faults = {}
        assert (await here.ask("POST", CHAT, chat(max_tokens=3))).status == 200
        here.assert_idle()
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not any("upstream" in name for name in names)


async def test_no_request_waits_for_the_garbage_collector(sim: SimServer) -> None:
    """A body is as large as a client likes: once answered, refused or left it must be free at once, not at the next
    full collection, which is off here: how long a look at all objects takes proves nothing.
    """
    async with gateway(provider("one", sim.url)) as here:
        gc.collect()
        gc.disable()
        try:
            for ending in ("answered", "refused", "unreadable", "left"):
                client = await Client.open(here.port, here.key)
                before = len(here.records)
                if ending == "answered":
                    await client.ask("POST", CHAT, chat())
                elif ending == "refused":
                    await client.ask("POST", CHAT, chat("unheard-of"))
                elif ending == "unreadable":
                    await client.ask("POST", CHAT, b"{")
                else:
                    client.send("POST", CHAT, None, [("Content-Length", "99999")])
                    client.writer.write(b"{" * 9999)
                    await until(lambda: here.app.in_flight() == 1, what="a request in flight")
                if ending != "left":
                    await until(lambda: not of_type(BaseRequest), 10.0, f"{ending}: an idle connection keeps none")
                client.leave()
                await here.settled(before + 1)
                await until(
                    lambda: not of_type(BaseRequest) and not of_type(ClientProtocol), 10.0, f"{ending}: all gone"
                )
        finally:
            gc.enable()


def of_type(kind: type) -> list[Any]:
    return [one for one in gc.get_objects() if isinstance(one, kind)]
