"""From journals into a real store, each record exactly once; and reading what is there."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger import frames
from gateway.ledger import shipper as shipping
from gateway.ledger.journal import Journal
from gateway.ledger.recovery import Adopted, adopt, decode, journals
from gateway.ledger.report import Window, usage
from gateway.ledger.shipper import Shipper, newest
from gateway.ledger.story import explain
from gateway.store.address import parse
from gateway.store.client import Store, StoreError
from gateway.store.scripts import Script
from tests.journeys.stage import until
from tests.ledger.books import died, exchange, finished
from tests.store_fixtures import Server


async def rows(root: Path, store: Store | None, *by: str, **more: Any) -> list[dict[str, Any]]:
    now = int(time.time())
    window = Window(by, more.get("since", now - 3600) // 3600 * 3600, more.get("until", now + 60))
    return await usage(root, store, window)


async def total(root: Path, store: Store | None) -> tuple[int, int, int]:
    found = await rows(root, store)
    if not found:
        return (0, 0, 0)
    return found[0]["requests"], found[0]["input_tokens"], found[0]["output_tokens"]


async def raw(store: Store) -> Counter[str]:
    return Counter([decode(payload).request_id async for _, payload in newest(store)])


def use(journal: Journal, numbers: range, **more: Any) -> None:
    for number in numbers:
        one = exchange(number, **more)
        journal.open(one)
        journal.post(finished(one))


@asynccontextmanager
async def shipped(root: Path, store: Store | None, **options: Any) -> AsyncIterator[tuple[Journal, Shipper]]:
    """A journal and its shipper, both running."""
    journal = Journal(root, segment_bytes=options.pop("segment_bytes", 8 * 1024 * 1024))
    journal.start()
    one = Shipper(journal, store, **options)
    one.start()
    try:
        yield journal, one
    finally:
        await journal.close()
        await one.stop()


async def test_each_record_once_visible_within_a_second(tmp_path: Path, store: Store) -> None:
    async with shipped(tmp_path, store) as (journal, one):
        use(journal, range(600))
        assert await total(tmp_path, store) == (600, 60_000, 6_000), "what is still in the journal counts at once"
        await until(lambda: one.shipped == 600, 1.0, "all shipped")
        assert await total(tmp_path, store) == (600, 60_000, 6_000)
        assert await raw(store) == Counter(f"req-{number:06d}" for number in range(600))
        use(journal, range(600, 610), key="other")
        by_key = {row["key"]: row for row in await rows(tmp_path, store, "key", "model", "day")}
        assert by_key["client"]["requests"] == 600
        assert by_key["other"]["requests"] == 10
        assert by_key["other"]["cost"] == pytest.approx(10 * (100 * 2.0 + 10 * 8.0) / 1e6)
        assert by_key["other"]["unpriced"] == 0
    assert await total(tmp_path, store) == (610, 61_000, 6_100), "the rest is shipped at the end"


async def test_shipped_again_counts_nothing_twice(tmp_path: Path, store: Store) -> None:
    """Killed between the store's answer and the deletion: the next process finds the same journal again."""
    copy = tmp_path / "copy"
    root = tmp_path / "journal"
    journal = Journal(root)
    journal.start()
    use(journal, range(300))
    journal.open(exchange(300))
    first = Shipper(journal, store)
    await first._round()
    assert first.shipped == 300
    await died(journal)
    shutil.copytree(root, copy)
    for _ in range(3):
        shutil.rmtree(root)
        shutil.copytree(copy, root)
        async with shipped(root, store, grace_s=0.1):
            await until(lambda: len(journals(root)) == 1, 20.0, "the dead journal is removed")
        assert (await total(root, store))[0] == 301, "300 and the one that never ended"
        assert (await raw(store))["req-000300"] == 1
        # its mark is gone with it; a copy that comes back is another story, so tell the store where it was
        await store.call("HSET", shipping.marks_key(store), journal.id, frames.position(2, 10_000_000))


async def test_damage_before_the_mark_counts_nothing_twice(tmp_path: Path, store: Store) -> None:
    """A shipped record that is then cut off the file: its request looks as if it had never ended."""
    root = tmp_path / "journal"
    journal = Journal(root)
    journal.start()
    use(journal, range(20))
    await Shipper(journal, store)._round()
    await died(journal)
    ((_, path),) = frames.segments(journal.folder)
    path.write_bytes(path.read_bytes()[:-100])
    async with shipped(root, store, grace_s=0.1):
        await until(lambda: len(journals(root)) == 1, 20.0, "the dead journal is removed")
    assert await total(root, store) == (20, 2000, 200)
    assert (await raw(store))["req-000019"] == 1


async def test_the_store_dies_under_load_and_comes_back(
    tmp_path: Path, store_server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "CALL_S", 0.5)
    async with shipped(tmp_path, store, segment_bytes=20_000, grace_s=0.3) as (journal, one):
        for round in range(30):
            use(journal, range(round * 50, round * 50 + 50))
            if round == 5:
                store_server.kill()
            if round == 12:
                store_server.start()
            if round == 20:
                store_server.pause()
            if round == 24:
                store_server.resume()
            await asyncio.sleep(0.05)
        await until(lambda: store.up, 5.0, "the store is back")
        await until(lambda: one._own.read == journal.position, 5.0, "all is shipped")
        # what a killed store had not synced yet is sent again from the journal
        assert await total(tmp_path, store) == (1500, 150_000, 15_000)
        assert await raw(store) == Counter(f"req-{number:06d}" for number in range(1500))
        await until(lambda: len(frames.segments(journal.folder)) <= 2, 20.0, "shipped segments are deleted")
        assert await total(tmp_path, store) == (1500, 150_000, 15_000)


async def test_a_segment_is_deleted_when_the_store_has_it_on_its_disk(
    tmp_path: Path, valkey_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before, however long that takes; only a store that never syncs is at last taken at its word."""
    monkeypatch.setattr(shipping, "SYNC_S", 0.05)
    assert valkey_server.ask("CONFIG SET appendfsync no") == b"+OK\r\n"
    store = Store(parse(valkey_server.url))
    await store.start()
    async with shipped(tmp_path, store, segment_bytes=3000, grace_s=0.05) as (journal, one):
        use(journal, range(30))
        await until(lambda: one.shipped == 30, what="shipped")
        before = len(frames.segments(journal.folder))
        await until(lambda: one._unsynced >= 3, 10.0, what="asked three times")
        assert len(frames.segments(journal.folder)) == before > 3
        assert valkey_server.ask("CONFIG SET appendfsync everysec") == b"+OK\r\n"
        await until(lambda: len(frames.segments(journal.folder)) == 1, 10.0, what="deleted")
        assert one._unsynced == 0

        monkeypatch.setattr(shipping, "UNSYNCED_MAX", 1)
        assert valkey_server.ask("CONFIG SET appendfsync no") == b"+OK\r\n"
        use(journal, range(30, 60))
        await until(lambda: one.shipped == 60 and len(frames.segments(journal.folder)) == 1, 10.0, what="deleted")
        assert "does not sync" in caplog.text
    await store.close()


async def test_whether_writes_are_on_disk(store: Store, store_server: Server) -> None:
    script = Script("write", "redis.call('SET', KEYS[1], ARGV[1]); return ARGV[1]")
    known = store_server.ask("COMMAND INFO waitaof").startswith(b"*1\r\n*1") and b"waitaof" in store_server.ask(
        "COMMAND INFO waitaof"
    )
    for _ in range(2):  # the server does not know the script, then it does
        answer = await store.run_synced(script, [store.key("x")], ["1"], sync_s=2.0, timeout_s=5.0)
        assert answer == (b"1", True if known else None)
    store_server.ask("CONFIG SET appendonly no")
    answer = await store.run_synced(script, [store.key("x")], ["2"], sync_s=0.1, timeout_s=5.0)
    assert answer == (b"2", None)
    with pytest.raises(StoreError):
        await store.run_synced(Script("wrong", "return nothing()"), [store.key("x")], sync_s=0.1, timeout_s=5.0)


async def test_without_a_store_the_journals_are_the_ledger(tmp_path: Path) -> None:
    dead = Journal(tmp_path)
    dead.start()
    use(dead, range(5))
    dead.open(exchange(5))
    await died(dead)
    async with shipped(tmp_path, None) as (journal, _):
        use(journal, range(10, 12))
        await until(lambda: len(frames.segments(dead.folder)) == 2, what="the dead journal is recovered")
        found = await rows(tmp_path, None)
        assert found[0]["requests"] == 8
        assert found[0]["partial"] == 1
    assert len(journals(tmp_path)) == 2, "nothing is deleted"


async def test_windows(tmp_path: Path, store: Store) -> None:
    day = 86_400
    at = int(time.time()) // day * day - 3 * day
    async with shipped(tmp_path, store) as (journal, one):
        for number, began in enumerate((at - 1, at, at + 3599, at + 3600, at + day, at + 2 * day)):
            use(journal, range(number, number + 1), began_unix_s=float(began))
        for _ in range(2):  # from the journal, then from the store
            assert (await rows(tmp_path, store, since=at, until=at + day))[0]["requests"] == 3
            assert (await rows(tmp_path, store, since=at + 10, until=at + day))[0]["requests"] == 3, "whole hours"
            assert (await rows(tmp_path, store, since=at + 3600, until=at + 3 * day))[0]["requests"] == 3
            assert [row["requests"] for row in await rows(tmp_path, store, "day", since=at - 1)] == [1, 3, 1, 1]
            assert [row["requests"] for row in await rows(tmp_path, store, "hour", since=at, until=at + day)] == [2, 1]
            await until(lambda: one.shipped == 6, what="shipped")


async def test_explain(tmp_path: Path, store: Store) -> None:
    async with shipped(tmp_path, store, segment_bytes=3000, grace_s=0.1) as (journal, one):
        use(journal, range(30))
        running = exchange(77)
        journal.open(running)
        await until(
            lambda: one.shipped == 30 and len(frames.segments(journal.folder)) == 1, 20.0, "shipped and deleted"
        )
        story = await explain(tmp_path, store, "req-000003")
        assert story is not None
        assert (story["found_in"], story["prompt_tokens"], story["key"]) == ("store", 100, "client")
        story = await explain(tmp_path, store, running.id)
        assert story is not None
        assert (story["open"], story["model"], story["upstream"]) == (True, "sim", "one")
        assert await explain(tmp_path, store, "req-nobody") is None


async def test_one_that_is_stopped_while_it_takes_over_gives_the_locks_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Journal(tmp_path)
    dead.start()
    await died(dead)
    taken, go_on = threading.Event(), threading.Event()

    def slowly(root: Path) -> Iterator[Adopted]:
        for adopted in adopt(root):
            taken.set()
            go_on.wait(5.0)
            yield adopted

    monkeypatch.setattr(shipping, "adopt", slowly)
    async with shipped(tmp_path, None):
        await until(taken.is_set, what="a lock taken")
        asyncio.get_running_loop().call_later(0.05, go_on.set)
    free = {adopted.folder: adopted.release() for adopted in adopt(tmp_path)}
    assert dead.folder in free
