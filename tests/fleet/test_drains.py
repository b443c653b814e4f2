"""What gateways that share a store remember of drains, with a clock of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from gateway.config import Lookup, Secret
from gateway.fleet.drains import FORGET_S, Drains
from gateway.store.client import Store
from tests.journeys.stage import gateway, provider
from tests.store_fixtures import Server

ONE = "one http://127.0.0.1:1"


class Catalog:
    """What Drains knows of a catalog."""

    def __init__(self) -> None:
        self.drained: frozenset[str] = frozenset()

    def drain(self, identities: Iterable[str]) -> None:
        self.drained = frozenset(identities)


class Gateway:
    now = 1e9

    def __init__(self, store: Store) -> None:
        self.catalog = Catalog()
        self.drains = Drains(self.catalog, store, lambda: self.now)  # type: ignore[arg-type]

    @property
    def drained(self) -> bool:
        return ONE in self.catalog.drained


async def test_a_drain_is_followed_by_those_who_remember_an_older_word(store: Store) -> None:
    old = Gateway(store)
    await old.drains.say(ONE, True, "alice")
    await old.drains.say(ONE, False, "alice")
    Gateway.now += FORGET_S + 1  # nobody needs to speak of it any more
    await old.drains.sync()
    assert await store.call("HLEN", store.key("drains")) == 0
    fresh = Gateway(store)
    await fresh.drains.sync()
    await fresh.drains.say(ONE, True, "bob")
    await old.drains.sync()
    assert fresh.drained
    assert old.drained


async def test_who_resumes_what_was_never_drained_says_nothing(store: Store) -> None:
    north, south = Gateway(store), Gateway(store)
    await north.drains.say(ONE, True, "alice")
    await south.drains.say(ONE, False, "bob")  # who has not heard of it
    for one in (north, south):
        await one.drains.sync()
    assert (north.drained, south.drained) == (True, True)


async def test_a_store_that_forgot_is_told_again(store: Store) -> None:
    north, south = Gateway(store), Gateway(store)
    await north.drains.say(ONE, True, "alice")
    await store.call("FLUSHALL")
    for _ in range(2):
        await north.drains.sync()
    await south.drains.sync()
    assert south.drained


async def test_an_old_word_that_changes_nothing_is_not_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gateway.fleet")
    old, fresh = Gateway(store), Gateway(store)
    await old.drains.say(ONE, True, "alice")
    await old.drains.say(ONE, False, "alice")
    assert [record.getMessage().partition(" is ")[2] for record in caplog.records] == [
        "drained by alice",
        "in service again by alice",
    ]
    caplog.clear()
    await fresh.drains.sync()
    assert caplog.records == []


async def test_nothing_is_followed_any_more_when_the_gateway_has_stopped(valkey_server: Server) -> None:
    before = asyncio.all_tasks()
    named = provider("named", lookups=(Lookup("host", "http://localhost:1/v1"),))
    async with gateway(named, store="auto", redis_url=Secret(valkey_server.url)):
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert "drains" in names
        assert any(name.startswith("look-ups of") for name in names)
    assert {task.get_name() for task in asyncio.all_tasks() - before} == set()
