"""A ledger without a store is bounded: the oldest segments become sums, and no reading misses or doubles a record."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from gateway.ledger import folded, frames
from gateway.ledger import shipper as shipping
from gateway.ledger.journal import Journal
from gateway.ledger.recovery import journals
from gateway.ledger.totals import DAY_S, HOUR_S
from gateway.store.client import Store
from tests.journeys.stage import until
from tests.ledger.books import died
from tests.ledger.test_shipper import rows, shipped, total, use

SEGMENT = 4000
KEEP = 20_000


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "ADOPT_EVERY_S", 0.02)
    monkeypatch.setattr(shipping, "SHIP_EVERY_S", 0.01)


def small(root: Path) -> bool:
    return folded.size_bytes(root) <= KEEP + SEGMENT


async def test_it_is_bounded_and_every_reading_is_whole(tmp_path: Path) -> None:
    async with shipped(tmp_path, None, segment_bytes=SEGMENT, keep_bytes=KEEP) as (journal, _):
        for round in range(40):
            use(journal, range(round * 10, round * 10 + 10))
            assert (await total(tmp_path, None))[0] == round * 10 + 10
            await asyncio.sleep(0.01)
        await until(lambda: small(tmp_path), what="folded")
        assert await total(tmp_path, None) == (400, 40_000, 4000)
        (row,) = await rows(tmp_path, None, "key", "group", "model", "upstream")
        assert (row["key"], row["group"], row["model"], row["requests"]) == ("client", "team", "sim", 400)
        assert row["cost"] == pytest.approx(400 * (100 * 2.0 + 10 * 8.0) / 1e6)
        assert frames.segments(journal.folder)[0][0] > 1
    assert sum(row.sums["requests"] for row in folded.read(tmp_path).hours) < 400, "the newest are kept one by one"


async def test_the_journals_of_the_dead_are_folded_and_removed(tmp_path: Path) -> None:
    for _ in range(4):
        journal = Journal(tmp_path, segment_bytes=SEGMENT)
        journal.start()
        (journal.folder / folded.ALONE).touch()
        use(journal, range(30))
        await died(journal)
    assert await total(tmp_path, None) == (120, 12_000, 1200)
    async with shipped(tmp_path, None, segment_bytes=SEGMENT, keep_bytes=KEEP):
        await until(lambda: small(tmp_path), what="folded")
        assert 1 < len(journals(tmp_path)) < 5
        assert await total(tmp_path, None) == (120, 12_000, 1200)
    async with shipped(tmp_path, None, segment_bytes=SEGMENT, keep_bytes=0):
        await until(lambda: len(journals(tmp_path)) == 1, what="all removed")
        assert await total(tmp_path, None) == (120, 12_000, 1200)


async def test_a_deletion_that_was_cut_short_counts_nothing_twice(tmp_path: Path, store: Store) -> None:
    """Not while it lies there, not when it is adopted, and not when a store is configured later."""
    root = tmp_path / "journal"
    journal = Journal(root, segment_bytes=SEGMENT)
    journal.start()
    (journal.folder / folded.ALONE).touch()
    use(journal, range(30))
    await died(journal)
    before = tmp_path / "before"
    shutil.copytree(journal.folder, before)
    chosen = [(journal.folder, number) for number, _ in frames.segments(journal.folder)[:3]]
    count = folded.fold(root, chosen, 0)
    assert 0 < count < 30
    assert folded.fold(root, chosen, 0) == 0, "they are in it"
    for _, path in frames.segments(before)[:2]:
        shutil.copy(path, journal.folder)
    assert await total(root, None) == (30, 3000, 300)
    async with shipped(root, None, segment_bytes=SEGMENT):
        await until(lambda: len(frames.segments(journal.folder)) < 1 + len(frames.segments(before)), what="trimmed")
        assert await total(root, None) == (30, 3000, 300)
    shutil.copy(frames.segments(before)[0][1], journal.folder)
    async with shipped(root, store, grace_s=0.05) as (_, one):
        await until(lambda: len(journals(root)) == 1, 20.0, "shipped and removed")  # a busy disk syncs late
        assert one.shipped == 30 - count
        assert await total(root, store) == (30, 3000, 300)


async def test_a_journal_that_was_begun_with_a_store_waits_for_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=SEGMENT)
    journal.start()
    use(journal, range(100))
    await died(journal)
    async with shipped(tmp_path, None, segment_bytes=SEGMENT, keep_bytes=0) as (own, _):
        use(own, range(100, 200))
        await until(lambda: len(frames.segments(own.folder)) == 1, what="its own is folded")
        assert len(frames.segments(journal.folder)) > 3
        assert await total(tmp_path, None) == (200, 20_000, 2000)


async def test_hours_of_long_ago_become_days(tmp_path: Path) -> None:
    day = int(time.time()) // DAY_S * DAY_S - 200 * DAY_S
    journal = Journal(tmp_path, segment_bytes=SEGMENT)
    journal.start()
    for number, at in enumerate((day, day + 5 * HOUR_S, day + DAY_S, day + 150 * DAY_S)):
        use(journal, range(number, number + 1), began_unix_s=float(at))
    await died(journal)
    folded.fold(tmp_path, [(journal.folder, 1)], day + 100 * DAY_S)
    kept = folded.read(tmp_path)
    assert [(row.at, row.sums["requests"]) for row in kept.days] == [(day, 2), (day + DAY_S, 1)]
    assert [row.at for row in kept.hours] == [day + 150 * DAY_S]
    found = await rows(tmp_path, None, "day", since=day, until=day + 201 * DAY_S)
    assert [row["requests"] for row in found] == [2, 1, 1]


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folded.json").write_text("{")
    with pytest.raises(ValueError, match=r"folded\.json cannot be understood"):
        await total(tmp_path, None)
