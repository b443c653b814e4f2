"""Calls on a real Valkey and a real Redis: answers, scripts, errors, and what happens to a call nobody waits for."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store.client import Store, StoreAway, StoreError
from gateway.store.scripts import Script
from tests.store_fixtures import Server

TAKE = Script("take", "return redis.call('INCRBY', KEYS[1], ARGV[1])")
WHO = Script("who", "return {ARGV[1], ARGV[2]}")


async def test_a_script_runs_whether_the_server_knows_it_or_not(store: Store) -> None:
    key = store.key("test", "count")
    assert await store.run(TAKE, [key], [2]) == 2
    assert await store.run(TAKE, [key], ["3"]) == 5
    assert await store.call("SCRIPT", "FLUSH") == b"OK"
    assert await store.run(TAKE, [key], [b"4"]) == 9
    assert await store.call("GET", key) == b"9"
    assert await store.run(WHO, [], [1.5, 10**15]) == [b"1.5", b"1000000000000000"]


async def test_scripts_are_flushed_between_calls_under_load(store: Store) -> None:
    key = store.key("test", "count")

    async def flush() -> None:
        for _ in range(20):
            await store.call("SCRIPT", "FLUSH", timeout_s=0.25)

    async def take() -> None:
        for _ in range(50):
            await store.run(TAKE, [key], [1], timeout_s=0.25)

    await asyncio.gather(flush(), take(), take(), take())
    assert await store.call("GET", key) == b"150"


async def test_an_error_of_the_script_is_no_reason_to_give_the_store_up(store: Store) -> None:
    broken = Script("broken", "return redis.call('INCR', KEYS[1], 'x')")
    for _ in range(10):
        with pytest.raises(StoreError):
            await store.run(broken, [store.key("test")])
    with pytest.raises(StoreError, match="unknown command"):
        await store.call("NOSUCH")
    assert store.up
    assert store.series.errors == {"reply": 11}


async def test_a_store_that_takes_no_writes_is_away(store: Store, store_server: Server) -> None:
    heard: list[bool] = []
    store.on_change.append(heard.append)
    assert store_server.ask("CONFIG", "SET", "maxmemory", "1") == b"+OK\r\n"
    for _ in range(3):
        with pytest.raises(StoreAway) as away:
            await store.call("SET", store.key("test"), "1")
        assert away.value.kind == "unusable"
    await asyncio.sleep(0.7)
    assert heard == [False]  # it answers reads, but is not back
    assert store_server.ask("CONFIG", "SET", "maxmemory", "0") == b"+OK\r\n"
    await asyncio.sleep(0.7)
    assert heard == [False, True]


async def test_a_thousand_cancelled_callers_cost_no_answer(store: Store) -> None:
    """Each call that is not cancelled gets its own answer, whoever was cancelled on the same connections."""

    async def ask(number: int) -> tuple[int, object]:
        return number, await store.run(WHO, [], [number, "x"], timeout_s=0.25)

    lost = answered = 0
    for batch in range(40):
        tasks = [asyncio.create_task(ask(batch * 50 + n)) for n in range(50)]
        for turn in range(25):  # at every point of a call's life
            if turn % 5 == 0:
                await asyncio.sleep(0)
            tasks[turn * 2].cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, asyncio.CancelledError):
                lost += 1
                continue
            assert not isinstance(result, BaseException), result
            assert result[1] == [str(result[0]).encode(), b"x"]
            answered += 1
    assert (lost, answered) == (1000, 1000)
    assert store.up
    assert store.series.errors == {}


async def test_what_nobody_waits_for_any_more_is_not_sent(store: Store, store_server: Server) -> None:
    key = store.key("test", "count")
    store_server.pause()
    tasks = [asyncio.create_task(store.run(TAKE, [key], [1])) for _ in range(100)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, StoreAway) for result in results)
    store_server.resume()
    async with asyncio.timeout(2):
        while not store.up:
            await asyncio.sleep(0.01)
    count = int(await store.call("GET", key) or 0)
    assert count <= 16  # those in flight, one for each connection


def test_keys_share_a_slot_and_never_collide() -> None:
    from gateway.store.address import Address

    store = Store(Address("single", (("h", 1),)))
    assert store.key("a", "b") == "{llm-gateway}:a:b"
    assert len({store.key("a:b", "c"), store.key("a", "b:c"), store.key("a%3Ab", "c"), store.key("a", "b", "c")}) == 4


async def test_calls_on_a_closed_store_are_refused(store_server: Server) -> None:
    from gateway.store.address import parse

    store = Store(parse(store_server.url))
    with pytest.raises(StoreAway):
        await store.call("PING")
    await store.start()
    assert await store.call("PING") is True
    await store.close()
    with pytest.raises(StoreAway):
        await store.call("PING")
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()
