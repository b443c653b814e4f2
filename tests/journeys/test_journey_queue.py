"""Upstreams that are full: requests wait in the gateway, fairly, and leave nothing behind however their wait ends."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.config import Model
from gateway.config.model import Tenant
from gateway.sim import Engine, SimServer
from tests.journeys.stage import CHAT, Answer, Client, Gateway, chat, gateway, provider, until


def posted(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


def depth(here: Gateway) -> int:
    return len(here.app.gate.queue)


def assert_idle(here: Gateway) -> None:
    """Nothing is left of any wait either."""
    here.assert_idle()
    gate = here.app.gate
    assert depth(here) == 0
    assert not gate._groups
    assert not gate._running
    assert not gate._charged
    for upstream in here.app.catalog.upstreams:
        assert upstream.held == 0
        assert upstream.on_room is None or not gate.queue.wanted(upstream)


@asynccontextmanager
async def crowded(
    sim: SimServer, room: int = 1, keys: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> AsyncIterator[Gateway]:
    """A gateway before `sim`, which takes `room` at once; `keys` have the fields given."""
    async with gateway(provider("one", sim.url, max_in_flight=room), keyed=keys, **settings) as here:
        yield here


async def occupied(here: Gateway, sim: SimServer, **more: Any) -> Client:
    """A client whose stream holds the only place, until it leaves."""
    client = await Client.open(here.port, here.key)
    client.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.02}, **more))
    await client.head()
    return client


async def ask(here: Gateway, name: str, **more: Any) -> Answer:
    return await here.ask("POST", CHAT, chat(**{"max_tokens": 4, **more}), key=here.keys[name])


async def queued(here: Gateway, names: str) -> list[asyncio.Task[Answer]]:
    """A request by each of the keys named, waiting in this order."""
    tasks = []
    for name in names:
        before = depth(here)
        tasks.append(asyncio.create_task(ask(here, name)))
        await until(lambda before=before: depth(here) == before + 1, what="a further one waiting")  # type: ignore[misc]
    return tasks


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer() as one:
        yield one


def order(here: Gateway) -> str:
    """Who was served, in order; the one that held the place aside."""
    return "".join(one.key for one in here.records if one.key != "client")


async def test_tenants_take_turns_however_many_one_of_them_sends(sim: SimServer) -> None:
    async with crowded(sim, keys={"a": {}, "b": {}}) as here:
        holder = await occupied(here, sim)
        tasks = await queued(here, "aaaaabb")
        assert len(posted(sim)) == 1, "the others wait here, and not at the engine"
        holder.abort()
        answers = await asyncio.gather(*tasks)
        assert {answer.status for answer in answers} == {200}
        assert order(here) == "ababaaa"
        assert all(one.queued_s > 0 for one in here.records if one.key != "client")
        assert here.records[0].queued_s == 0
        await here.settled(8)
        assert_idle(here)


async def test_keys_of_a_group_are_one_tenant_and_its_weight_is_configured(sim: SimServer) -> None:
    keys = {"a": {"group": "big"}, "b": {"group": "big"}, "c": {}}
    async with crowded(sim, keys=keys, tenants=(Tenant("big", 2.0),)) as here:
        holder = await occupied(here, sim)
        tasks = await queued(here, "ababababcccc")
        holder.abort()
        await asyncio.gather(*tasks)
        assert order(here)[:8].count("c") < 4


async def test_a_key_has_a_weight(sim: SimServer) -> None:
    async with crowded(sim, keys={"a": {"weight": 3.0}, "b": {}}) as here:
        holder = await occupied(here, sim)
        tasks = await queued(here, "bbbbbbaaaaaa")
        holder.abort()
        await asyncio.gather(*tasks)
        assert order(here)[:8].count("a") >= 5


async def test_priorities_stand_above_fairness(sim: SimServer) -> None:
    keys = {"l": {"priority": "low"}, "n": {}, "h": {"priority": "high"}}
    async with crowded(sim, keys=keys) as here:
        holder = await occupied(here, sim)
        tasks = await queued(here, "llnnhh")
        holder.abort()
        await asyncio.gather(*tasks)
        assert order(here) == "hhnnll"


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [("normal", "low", "low"), ("normal", "high", "normal"), ("high", "Normal", "normal"), ("low", "?", "low")],
)
async def test_a_request_may_wait_in_a_lower_class_than_its_key_and_in_no_higher(
    sim: SimServer, own: str, asked: str, expected: str
) -> None:
    async with crowded(sim, keys={"a": {"priority": own}}) as here:
        holder = await occupied(here, sim)
        headers = [("x-gateway-priority", asked)]
        task = asyncio.create_task(here.ask("POST", CHAT, chat(), headers, key=here.keys["a"]))
        await until(lambda: depth(here) == 1)
        assert f'gateway_queue_depth{{class="{expected}"}} 1.0' in await here.scrape()
        holder.abort()
        assert (await task).status == 200
        assert posted(sim)[-1].header("x-gateway-priority") is None


async def test_the_deadline_is_a_503_with_the_time_the_queue_needs(sim: SimServer) -> None:
    async with crowded(sim, queue_s=0.4) as here:
        holder = await occupied(here, sim)
        answer = await ask(here, "client")
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        assert answer.error["type"] == "overloaded_error"
        assert int(answer.header("retry-after") or 0) >= 1
        assert answer.header("x-should-retry") is None
        record = here.record
        assert (record.status, record.outcome, record.error) == (503, "refused", "no_capacity")
        assert 0.4 <= record.queued_s < 2.0
        assert (record.model, record.attempts, record.upstream_s) == ("sim", 0, 0.0)
        holder.abort()
        await here.settled(2)
        assert_idle(here)
        assert 'gateway_queue_shed_total{reason="deadline"} 1.0' in await here.scrape()


async def test_where_nobody_may_wait_the_503_comes_at_once(sim: SimServer) -> None:
    async with crowded(sim, queue_s=0.0) as here:
        holder = await occupied(here, sim)
        answer = await ask(here, "client")
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        assert answer.header("retry-after")
        assert here.record.duration_s < 0.5
        holder.abort()


async def test_a_full_queue_sheds_the_one_who_fills_it(sim: SimServer) -> None:
    async with crowded(sim, keys={"a": {}, "b": {}}, queue_max=4) as here:
        holder = await occupied(here, sim)
        flood = await queued(here, "aaaa")
        answer = await ask(here, "a")
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        assert answer.header("retry-after")
        light = asyncio.create_task(ask(here, "b"))
        shed = await flood[3]
        assert shed.status == 503, "the newest of the flood made room"
        holder.abort()
        assert (await light).status == 200
        assert {(await one).status for one in flood[:3]} == {200}
        assert 'gateway_queue_shed_total{reason="full"} 2.0' in await here.scrape()
        await here.settled(7)
        assert_idle(here)


@pytest.mark.parametrize("how", ["leave", "reset"])
async def test_a_client_that_leaves_while_it_waits(sim: SimServer, how: str) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        client = await Client.open(here.port, here.key)
        client.send("POST", CHAT, chat(stream=True))
        await until(lambda: depth(here) == 1)
        getattr(client, how)()
        await until(lambda: depth(here) == 0, what="the wait given up")
        await here.settled(1)
        assert (here.record.status, here.record.outcome) == (499, "client_gone")
        assert len(posted(sim)) == 1, "the engine never heard of it"
        assert posted(sim)[0].closed_at is None
        holder.abort()
        await here.settled(2)
        assert_idle(here)


async def test_room_that_comes_as_its_client_leaves_goes_to_the_next(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        leaving = await Client.open(here.port, here.key)
        leaving.send("POST", CHAT, chat())
        await until(lambda: depth(here) == 1)
        staying = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 2)
        upstream = here.app.catalog.upstreams[0]
        (first, _) = here.app.gate.queue.upcoming()
        # Both in one turn of the loop: the room is given, and the task is cancelled before it runs.
        task = first.of.woken._callbacks[0][0].__self__  # which waits for it
        upstream.max_in_flight = 2
        here.app.gate._released(upstream)
        upstream.max_in_flight = 1
        assert upstream.held == 1
        task.cancel()
        await until(lambda: upstream.held == 0, what="the room given back")
        assert depth(here) == 1
        holder.abort()
        assert (await staying).status == 200
        leaving.abort()
        await here.settled(3)
        assert_idle(here)


async def test_room_that_comes_after_its_client_left_goes_to_the_next(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        leaving = await Client.open(here.port, here.key)
        leaving.send("POST", CHAT, chat())
        await until(lambda: depth(here) == 1)
        staying = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 2)
        (first, _) = here.app.gate.queue.upcoming()
        first.of.woken._callbacks[0][0].__self__.cancel()  # and before that task runs:
        holder.abort()
        assert (await staying).status == 200
        leaving.abort()
        await here.settled(3)
        assert_idle(here)


async def test_a_burst_never_exceeds_what_each_upstream_takes_and_all_are_served() -> None:
    most = {}
    engines = [Engine(speed=40.0, max_sequences=64) for _ in range(2)]
    async with (
        SimServer(engine=engines[0]) as one,
        SimServer(engine=engines[1]) as two,
        gateway(provider("fleet", one.url, two.url, max_in_flight=4), keyed={"a": {}, "b": {}}) as here,
    ):
        watching = asyncio.create_task(_watch(here, most))
        answers = await asyncio.gather(
            *(ask(here, "ab"[number % 2], stream=number % 3 == 0, max_tokens=16) for number in range(200))
        )
        watching.cancel()
        assert {answer.status for answer in answers} == {200}
        assert most
        assert max(most.values()) == 4
        counts = [len(posted(sim)) for sim in (one, two)]
        assert sum(counts) == 200
        assert min(counts) > 60
        await here.settled(200)
        assert_idle(here)


async def _watch(here: Gateway, most: dict[str, int]) -> None:
    while True:
        for upstream in here.app.catalog.upstreams:
            most[upstream.name] = max(most.get(upstream.name, 0), upstream.in_flight)
        await asyncio.sleep(0)


async def test_models_that_share_an_upstream_share_its_queue(sim: SimServer) -> None:
    async with SimServer(models=("big", "small")) as both:
        models = (Model("big", "big"), Model("small", "small"))
        keyed: Any = {"a": {}, "b": {}}
        async with gateway(provider("one", both.url, models=models, max_in_flight=1), keyed=keyed) as here:
            holder = await occupied(here, both, model="big")
            tasks = []
            for name, model in (("a", "big"), ("a", "big"), ("a", "big"), ("b", "small")):
                before = depth(here)
                tasks.append(asyncio.create_task(ask(here, name, model=model)))
                await until(lambda before=before: depth(here) == before + 1)  # type: ignore[misc]
            holder.abort()
            await asyncio.gather(*tasks)
            assert order(here) == "abaa"


async def test_an_upstream_that_comes_back_takes_those_who_wait() -> None:
    async with (
        SimServer() as one,
        SimServer() as two,
        gateway(provider("f", one.url, two.url, max_in_flight=1)) as here,
    ):
        first, second = here.app.catalog.upstreams
        second.draining = True
        holder = await occupied(here, one)
        task = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 1)
        await asyncio.sleep(0.6)
        assert depth(here) == 1
        second.draining = False
        assert (await task).status == 200
        assert here.records[0].upstream == second.name
        assert first.in_flight == 1
        holder.abort()


async def test_those_who_wait_for_an_upstream_that_is_taken_out_are_told(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        task = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 1)
        here.app.catalog.upstreams[0].draining = True
        answer = await task
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        holder.abort()
        await here.settled(2)
        assert_idle(here)


@pytest.mark.parametrize("tools", [False, True])
async def test_those_who_wait_go_to_the_hosts_that_replaced_theirs(sim: SimServer, tools: bool) -> None:
    async with SimServer() as new, crowded(sim) as here:
        holder = await occupied(here, sim)
        more: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f"}}]} if tools else {}
        asked = asyncio.create_task(here.ask("POST", CHAT, chat(max_tokens=4, **more)))
        await until(lambda: depth(here) == 1, what="one waiting")
        here.app.catalog.configure(
            [provider("bare", new.url, models=(Model("sim", "sim", supports_tools=False),)), provider("two", new.url)]
            if tools
            else [provider("two", new.url)]
        )
        answer = await asked
        assert (answer.status, answer.header("x-gateway-upstream")) == (200, "two")
        assert len(posted(sim)) == 1
        holder.abort()
        await until(lambda: here.app.metrics.in_flight.value == 0, what="the holder gone")
        assert_idle(here)


async def test_those_who_wait_keep_their_hosts_where_nothing_replaced_them(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        asked = asyncio.create_task(here.ask("POST", CHAT, chat(max_tokens=4)))
        await until(lambda: depth(here) == 1, what="one waiting")
        here.app.catalog.configure([])
        await asyncio.sleep(0.6)
        assert not asked.done()
        holder.abort()
        assert (await asked).status == 200
        assert_idle(here)


async def test_those_who_wait_when_the_gateway_stops_are_told(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        task = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 1)
        here.app.gate.close()
        answer = await task
        assert (answer.status, answer.error["code"]) == (503, "no_capacity")
        assert "shutting down" in answer.error["message"]
        assert (await ask(here, "client")).status == 503
        holder.abort()
        await here.settled(3)
        assert_idle(here)


async def test_nothing_leaks_in_500_waits_that_end_at_random() -> None:
    dice = random.Random(3)
    async with SimServer(engine=Engine(speed=60.0)) as sim, crowded(sim, 3, queue_s=0.3, queue_max=30) as here:
        seats = asyncio.Semaphore(60)

        async def one() -> None:
            async with seats:
                client = await Client.open(here.port, here.key)
                client.send("POST", CHAT, chat(stream=dice.random() < 0.5, max_tokens=dice.choice([1, 8, 60])))
                if dice.random() < 0.5:
                    await asyncio.sleep(dice.random() * 0.2)
                else:
                    answer = await client.rest(await client.head())
                    assert answer.status in (200, 503)
                client.reset() if dice.random() < 0.5 else client.abort()

        async with asyncio.timeout(50):
            await asyncio.gather(*(one() for _ in range(500)))
        await here.settled(500)
        await until(lambda: here.app.in_flight() == 0)
        assert_idle(here)
        found = {one.outcome for one in here.records}
        assert {"ok", "client_gone"} <= found <= {"ok", "client_gone", "refused"}


async def test_what_the_queue_tells_in_metrics(sim: SimServer) -> None:
    async with crowded(sim, keys={"a": {}, "b": {"priority": "high"}}) as here:
        holder = await occupied(here, sim)
        tasks = await queued(here, "aab")
        text = await here.scrape()
        assert 'gateway_queue_depth{class="high"} 1.0' in text
        assert 'gateway_queue_depth{class="normal"} 2.0' in text
        assert "gateway_queue_tenants 2.0" in text
        holder.abort()
        await asyncio.gather(*tasks)
        text = await here.scrape()
        assert re.search(r"^gateway_queue_wait_seconds_count 3\.0$", text, re.MULTILINE)
        assert 'gateway_queue_depth{class="normal"} 0.0' in text


@pytest.mark.parametrize(("reserve", "free"), [(4, 2), (0, 0)])
async def test_a_few_places_are_kept_for_those_within_their_share(sim: SimServer, reserve: int, free: int) -> None:
    """Of 40 places two, a twentieth: the next request of the one who floods not is served without any release."""
    async with crowded(sim, 40, keys={"a": {}, "b": {}}, queue_reserve=reserve) as here:
        upstream = here.app.catalog.upstreams[0]
        flood = [await Client.open(here.port, here.key) for _ in range(60)]
        for client in flood:
            client.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.05}), key=here.keys["a"])
        await until(lambda: depth(here) == 20)
        first = asyncio.create_task(ask(here, "b"))
        await until(lambda: depth(here) == 21)
        running = [one for one in flood if not one.reader.at_eof() and await _began(one)]
        for client in running[:8]:
            client.abort()
        assert (await first).status == 200
        await until(lambda: upstream.in_flight == 40 - free)
        await asyncio.sleep(0.6)
        assert upstream.in_flight == 40 - free
        if free:
            assert (await ask(here, "b")).status == 200
            assert depth(here) > 0
        for client in flood:
            client.abort()
        await until(lambda: here.app.in_flight() == 0)
        assert_idle(here)


async def _began(client: Client) -> bool:
    """Whether the stream's head is there."""
    try:
        async with asyncio.timeout(0.05):
            await client.head()
    except TimeoutError:
        return False
    return True


async def test_llamacpp_is_asked_for_its_slots_and_gets_no_more_than_those() -> None:
    most: dict[str, int] = {}
    async with (
        SimServer(engine=Engine(speed=60.0, max_sequences=3), runtime="llamacpp") as sim,
        gateway(provider("one", sim.url, runtime="llamacpp")) as here,
    ):
        (upstream,) = here.app.catalog.upstreams
        assert upstream.limit == 3
        watching = asyncio.create_task(_watch(here, most))
        answers = await asyncio.gather(*(ask(here, "client", max_tokens=8) for _ in range(20)))
        watching.cancel()
        assert {answer.status for answer in answers} == {200}
        assert most == {"one": 3}
        assert sum(one.queued_s > 0 for one in await here.settled(20)) == 17
        assert_idle(here)


async def test_a_limit_that_is_raised_lets_those_in_who_wait(sim: SimServer) -> None:
    async with crowded(sim) as here:
        holder = await occupied(here, sim)
        task = asyncio.create_task(ask(here, "client"))
        await until(lambda: depth(here) == 1)
        here.app.catalog.upstreams[0].max_in_flight = 2
        assert (await task).status == 200
        holder.abort()


async def test_an_engine_that_dies_while_others_wait_for_it_leaves_them_to_the_rest() -> None:
    """The waits for a pool go on with what is left of it, and what ran on the dead one is tried again."""
    async with (
        SimServer(engine=Engine(speed=20.0)) as one,
        SimServer(engine=Engine(speed=20.0)) as two,
        gateway(provider("fleet", one.url, two.url, max_in_flight=2)) as here,
    ):
        tasks = [asyncio.create_task(ask(here, "client", max_tokens=40)) for _ in range(12)]
        await until(lambda: depth(here) == 8)
        one.kill()
        answers = await asyncio.gather(*tasks)
        assert {answer.status for answer in answers} == {200}
        await here.settled(12)
        assert_idle(here)


async def test_a_running_answer_is_charged_while_it_is_made(sim: SimServer) -> None:
    async with crowded(sim, 2, keys={"a": {}, "b": {}}) as here:
        holder = await occupied(here, sim)
        talker = await Client.open(here.port, here.keys["a"])
        talker.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.01}))
        await talker.head()
        tasks = await queued(here, "ab")
        gate = here.app.gate
        await until(lambda: max(gate._charged.values(), default=0.0) > 150, what="its tokens charged")
        holder.abort()
        await asyncio.gather(*tasks)
        assert order(here) == "ba", "a came first, and has used more"
        talker.abort()
        await here.settled(4)
        assert_idle(here)
