"""A store that stalls, dies and comes back: what a call costs meanwhile, and how soon everybody knows."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

import pytest

from gateway.store.address import parse
from gateway.store.client import REQUEST_TIMEOUT_S, Store, StoreAway
from gateway.store.scripts import Script
from tests.store_fixtures import Server

ECHO = Script("echo", "return ARGV[1]")


async def changed(store: Store, up: bool, within_s: float) -> float:
    """Wait until `store.up` is `up`; the seconds it took."""
    began_at = monotonic()
    async with asyncio.timeout(within_s):
        while store.up is not up:
            await asyncio.sleep(0.005)
    return monotonic() - began_at


async def ask(store: Store) -> tuple[float, str]:
    """How long one call took, and "" or why it failed."""
    began_at = monotonic()
    try:
        assert await store.run(ECHO, [store.key("x")], ["1"]) == b"1"
    except StoreAway as away:
        return monotonic() - began_at, away.kind
    return monotonic() - began_at, ""


class Lateness:
    """How much later than due the loop came round in the block, all in all: the part a busy machine has in a wait."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def __aenter__(self) -> Lateness:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.002)  # what it has not seen yet
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            due_at = monotonic() + 0.001
            await asyncio.sleep(0.001)
            self.seconds += max(0.0, monotonic() - due_at - 0.001)


async def test_a_paused_store_costs_little_then_nothing(
    store: Store, store_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.store")
    heard: list[bool] = []
    store.on_change.append(heard.append)
    assert store.series.up.value == 1
    store_server.pause()
    waits = []
    async with Lateness() as late:
        while store.up:
            waits.append(await ask(store))
    assert [kind for _, kind in waits] == ["timeout"] * 3
    assert all(0.9 * REQUEST_TIMEOUT_S <= took < 0.06 + late.seconds for took, _ in waits), (waits, late.seconds)
    refused = [await ask(store) for _ in range(500)]
    assert {kind for _, kind in refused} == {"open"}
    assert sorted(took for took, _ in refused)[494] < 0.001
    assert store.series.up.value == 0
    assert store.series.errors["open"] == 500
    assert "is away (timeout) for" in store.trouble
    await asyncio.sleep(0.8)  # probes against a store that is still away
    assert heard == [False]
    store_server.resume()
    assert await changed(store, True, 2.0) < 2.0
    assert heard == [False, True]
    assert store.trouble == ""
    assert (await ask(store))[1] == ""
    assert [(one.levelname, one.message.split(" unix")[0]) for one in caplog.records] == [
        ("WARNING", "the store at"), ("INFO", "the store at"),
    ]  # fmt: skip  # once each, however many calls failed


async def test_a_pause_under_concurrent_calls_opens_the_breaker_at_once(store: Store, store_server: Server) -> None:
    store_server.pause()
    async with Lateness() as late:
        results = await asyncio.gather(*(ask(store) for _ in range(200)))
    assert not store.up
    # Nobody waits for a turn: sixteen at a time would take half a second and more.
    assert max(took for took, _ in results) < 0.1 + late.seconds
    assert {kind for _, kind in results} == {"timeout", "busy"}
    store_server.resume()
    await changed(store, True, 2.0)
    assert {kind for _, kind in await asyncio.gather(*(ask(store) for _ in range(10)))} == {""}


async def test_a_killed_store_is_known_without_traffic_and_its_return_too(store: Store, store_server: Server) -> None:
    assert store_server.ask("CONFIG", "SET", "appendfsync", "always") == b"+OK\r\n"  # a busy disk may sync late
    assert await store.call("SET", store.key("kept"), "1") is True
    store_server.kill()
    await changed(store, False, 2.5)
    assert store.series.errors.get("connection") == 3
    store_server.start()
    await changed(store, True, 2.0)
    assert await store.call("GET", store.key("kept")) == b"1"


async def test_a_restart_between_two_calls_is_not_noticed(store: Store, store_server: Server) -> None:
    assert (await ask(store))[1] == ""
    store_server.restart()
    await asyncio.sleep(0.01)  # the loop hears that the connection ended
    assert (await ask(store))[1] == ""  # a new connection, and the script again


async def test_a_store_that_is_away_at_the_start_is_found_later(store_server: Server) -> None:
    store_server.kill()
    store = Store(parse(store_server.url))
    await store.start()
    try:
        assert not store.up
        assert store.trouble
        store_server.start()
        await changed(store, True, 2.0)
    finally:
        await store.close()


async def test_a_loop_that_stood_still_does_not_blame_the_store(store: Store) -> None:
    import time

    await ask(store)
    for _ in range(5):
        task = asyncio.create_task(ask(store))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(2 * REQUEST_TIMEOUT_S)  # noqa: ASYNC251  # it is the point
        assert (await task)[1] == ""


async def test_slow_background_work_takes_nothing_from_requests(store: Store) -> None:
    slow = [asyncio.create_task(store.call("BLPOP", store.key("none"), 0.3, timeout_s=4.0)) for _ in range(8)]
    await asyncio.sleep(0.05)
    waits = [await ask(store) for _ in range(20)]
    assert {kind for _, kind in waits} == {""}
    assert await asyncio.gather(*slow) == [None] * 8


async def test_closing_while_the_store_hangs_ends_soon(store_server: Server) -> None:
    store = Store(parse(store_server.url))
    await store.start()
    store_server.pause()
    task = asyncio.create_task(store.call("BLPOP", store.key("none"), 60, timeout_s=9.0))
    await asyncio.sleep(0.05)
    began_at = monotonic()
    await store.close()
    assert monotonic() - began_at < 1.5
    with pytest.raises(StoreAway):
        await task


async def test_whatever_the_client_raises_the_store_is_away_and_comes_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop says of a transport that was closed a moment ago that its "handler is closed": a RuntimeError, to redis-py
    nobody's connection.
    """
    assert store._requests is not None
    client = store._requests.client

    async def closed(*_: object) -> None:
        raise RuntimeError("unable to perform operation on <UnixTransport closed=True>; the handler is closed")

    with monkeypatch.context() as patch:
        patch.setattr(client, "execute_command", closed)
        assert {(await ask(store))[1] for _ in range(3)} == {"connection"}
        assert not store.up
        await asyncio.sleep(0.7)  # the heartbeat meets it, too
    assert await changed(store, True, 3.0) < 3.0
