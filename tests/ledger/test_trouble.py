"""What goes wrong at odd moments, in the store, on the disk and in what runtimes report: each record still once."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger import frames, report
from gateway.ledger import shipper as shipping
from gateway.ledger.journal import Journal
from gateway.ledger.recovery import journals
from gateway.ledger.report import Window, usage
from gateway.ledger.shipper import Shipper
from gateway.ledger.totals import DAY_S, HOUR_S
from gateway.store.client import Store, StoreAway
from tests.ledger.books import died, exchange, finished, journal


def use(one: Journal, numbers: range, tokens: int = 10) -> None:
    for number in numbers:
        asked = exchange(number)
        one.open(asked)
        one.post(finished(asked, completion=tokens))


async def requests(root: Path, store: Store) -> tuple[int, int]:
    now = int(time.time())
    (row,) = await usage(root, store, Window((), (now - 7200) // HOUR_S * HOUR_S, now + 60))
    return row["requests"], row["output_tokens"]


async def rounds(shipper: Shipper) -> None:
    for _ in range(3):
        await shipper._round()


async def test_a_sum_that_is_full_does_not_count_the_others_again(tmp_path: Path, store: Store) -> None:
    async with journal(tmp_path) as one:
        use(one, range(3), tokens=2**62)  # the third would overflow
        use(one, range(3, 5), tokens=2**70)  # no number of the store's
        shipper = Shipper(one, store)
        await rounds(shipper)
        assert shipper.shipped == 5
        assert (await requests(tmp_path, store))[0] == 5


async def test_what_the_store_forgot_is_shipped_again_without_a_new_request(tmp_path: Path, store: Store) -> None:
    async with journal(tmp_path, segment_bytes=3000) as one:
        use(one, range(20))
        shipper = Shipper(one, store, grace_s=0.0)
        await shipper._ship(shipper._own)
        await store.call("FLUSHALL")
        for _ in range(4):
            await shipper._round()
        assert int(await store.call("HGET", shipping.marks_key(store), one.id)) == shipper._own.mark > 0
        assert await requests(tmp_path, store) == (20, 200)


async def dead_journal(root: Path, numbers: range) -> Journal:
    one = Journal(root)
    one.start()
    use(one, numbers)
    await died(one)
    return one


async def test_a_store_that_fails_between_a_journals_end_and_its_marks_holds_up_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead_journal(tmp_path, range(5))
    await dead_journal(tmp_path, range(5, 9))
    call = store.call
    failing = [True]

    async def fails_once(*command: Any, **options: Any) -> Any:
        if command[0] == "HDEL" and failing:
            failing.clear()
            raise StoreAway("timeout")
        return await call(*command, **options)

    monkeypatch.setattr(store, "call", fails_once)
    async with journal(tmp_path) as one:
        shipper = Shipper(one, store, grace_s=0.0)
        with pytest.raises(StoreAway):
            await rounds(shipper)
        await rounds(shipper)
        assert journals(tmp_path) == [one.folder]
        assert shipper._adopted == []
        assert await call("HLEN", shipping.marks_key(store)) == 0
        assert await requests(tmp_path, store) == (9, 90)


async def test_a_journal_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = await dead_journal(tmp_path, range(5))
    await dead_journal(tmp_path, range(5, 9))
    read_batch = shipping.read_batch

    def reading(folder: Path, *args: Any, **options: Any) -> shipping.Batch:
        if folder == bad.folder:
            raise OSError("a bad block")
        return read_batch(folder, *args, **options)

    monkeypatch.setattr(shipping, "read_batch", reading)
    async with journal(tmp_path) as one:
        shipper = Shipper(one, store, grace_s=0.0)
        await rounds(shipper)
        assert shipper.shipped == 4
        monkeypatch.undo()
        shipper._adopt_at = 0.0
        await rounds(shipper)
        assert shipper.shipped == 9
        assert await requests(tmp_path, store) == (9, 90)


async def test_a_journal_that_is_removed_while_a_report_reads_is_not_counted_twice(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead_journal(tmp_path, range(5))
    read_sums = report._sums

    async with journal(tmp_path) as one:
        shipper = Shipper(one, store, grace_s=0.0)

        async def later(*args: Any) -> Any:
            while len(journals(tmp_path)) > 1:
                await shipper._round()
            return await read_sums(*args)

        monkeypatch.setattr(report, "_sums", later)
        assert await requests(tmp_path, store) == (5, 50)


async def test_a_record_that_nobody_understands_spoils_no_report(tmp_path: Path, store: Store) -> None:
    async with journal(tmp_path) as one:
        use(one, range(2))
        one._write(frames.pack(frames.FINAL, b'{"at":"another version"}'))
        use(one, range(2, 4))
        assert await requests(tmp_path, store) == (4, 40)
        shipper = Shipper(one, store)
        await rounds(shipper)
        assert await requests(tmp_path, store) == (4, 40)


def test_windows_end_where_sums_do() -> None:
    now = datetime(2026, 7, 1, 12, 34, tzinfo=UTC)
    window = Window.parse("key", "2026-06-30T10:20", "2026-06-30T11:20", now)
    assert (window.since % HOUR_S, window.until - window.since) == (0, 2 * HOUR_S)
    long_ago = Window.parse("key", "2026-01-10T10:20", "2026-01-12T10:20", now)
    assert (long_ago.since % DAY_S, long_ago.until % DAY_S) == (0, 0)
    assert long_ago.until - long_ago.since == 3 * DAY_S
    assert Window.parse("key", "1h", "", now).until == int(now.timestamp()) + 1
