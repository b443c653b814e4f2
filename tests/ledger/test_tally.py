"""Sums that are shipped without reading the journal back: what must be exact when not all goes as it should."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger import shipper as shipping
from gateway.ledger import tally
from gateway.ledger.journal import Journal
from gateway.ledger.shipper import Shipper
from gateway.ledger.tally import Tallies
from gateway.store.client import Store, StoreAway
from tests.ledger.books import died
from tests.ledger.test_shipper import raw, rows, total, use


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each reading of a journal gave."""
    found: list[int] = []
    read = shipping.read_batch

    def counted(*args: Any, **more: Any) -> Any:
        batch = read(*args, **more)
        found.append(len(batch.records))
        return batch

    monkeypatch.setattr(shipping, "read_batch", counted)
    return found


async def test_many_keys_and_no_reading_back(tmp_path: Path, store: Store, reads: list[int]) -> None:
    journal = Journal(tmp_path)
    journal.start()
    one = Shipper(journal, store)
    for number in range(600):
        use(journal, range(number, number + 1), key=f"key-{number % 300}")
    await one._round()
    assert one.shipped == 600
    assert sum(reads) == 0
    by_key = {row["key"]: row["requests"] for row in await rows(tmp_path, store, "key")}
    assert by_key == {f"key-{number}": 2 for number in range(300)}
    assert await raw(store) == Counter(f"req-{number:06d}" for number in range(600))
    await died(journal)


async def test_what_is_too_much_to_be_kept_is_read_from_the_journal(
    tmp_path: Path, store: Store, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "RECORDS_MAX", 10)
    monkeypatch.setattr(tally, "KEPT", 3)
    journal = Journal(tmp_path)
    journal.start()
    one = Shipper(journal, store)
    use(journal, range(95))
    await one._round()
    assert sum(reads) == 80, "four were full: all of them are forgotten; and so again"
    assert one.shipped == 95
    assert await total(tmp_path, store) == (95, 9_500, 950)
    assert await raw(store) == Counter(f"req-{number:06d}" for number in range(95))
    await died(journal)


@pytest.mark.parametrize("ran", [True, False])
async def test_a_call_that_may_have_run(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, ran: bool
) -> None:
    journal = Journal(tmp_path)
    journal.start()
    one = Shipper(journal, store)
    use(journal, range(20))
    run = store.run

    async def lost(*args: Any, **more: Any) -> Any:
        if ran:
            await run(*args, **more)
        raise StoreAway("timeout")

    monkeypatch.setattr(store, "run", lost)
    with pytest.raises(StoreAway):
        await one._round()
    monkeypatch.setattr(store, "run", run)
    use(journal, range(20, 30))
    await one._round()
    assert await total(tmp_path, store) == (30, 3_000, 300)
    assert await raw(store) == Counter(f"req-{number:06d}" for number in range(30))
    await died(journal)


async def test_a_mark_between_two_borders(tmp_path: Path, store: Store, reads: list[int]) -> None:
    """As after a store that came back from an older copy of itself: the journal is read from there."""
    journal = Journal(tmp_path)
    journal.start()
    one = Shipper(journal, store)
    use(journal, range(10))
    middle = journal.position
    use(journal, range(10, 25))
    await store.call("HSET", shipping.marks_key(store), journal.id, middle)
    await one._round()
    assert sum(reads) == 15
    assert (await raw(store)).keys() == {f"req-{number:06d}" for number in range(10, 25)}
    await died(journal)


async def test_the_stream_keeps_the_newest(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "STREAM_MAX", 50)
    journal = Journal(tmp_path)
    journal.start()
    one = Shipper(journal, store)
    for start in range(0, 300, 30):
        use(journal, range(start, start + 30))
        await one._round()
    assert list((await raw(store)).elements()) == [f"req-{number:06d}" for number in range(299, 239, -1)]
    await died(journal)


def test_a_tally_that_was_forgotten_while_it_was_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "RECORDS_MAX", 1)
    monkeypatch.setattr(tally, "KEPT", 1)
    tallies = Tallies(0)
    tallies._close()
    shipped = tallies.first()
    tallies.restart(100)
    assert shipped is not None
    tallies.shipped(shipped)
    assert (tallies.start, tallies.first()) == (100, None)
    tallies.align(200, 300)
    assert tallies.start == 300
