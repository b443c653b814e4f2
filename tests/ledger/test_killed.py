"""A shipper killed between any two of its steps, as a process by SIGKILL (U9): each record is in the store once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gateway.ledger import shipper as shipping
from gateway.ledger.recovery import journals, recover
from gateway.store.address import parse
from gateway.store.client import Store
from tests.ledger.killed import PLACES
from tests.ledger.test_shipper import raw, total
from tests.store_fixtures import Server

ROOT = Path(__file__).parents[2]
RECORDS = 100


def lived(root: Path, server: Server, place: str) -> int:
    """The process's exit code; -9 if it was killed."""
    words = [sys.executable, "-m", "tests.ledger.killed", str(root), server.url, place, str(RECORDS)]
    return subprocess.run(words, cwd=ROOT, timeout=50, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[:-1])
async def test_killed_at_each_step(tmp_path: Path, valkey_server: Server, place: str) -> None:
    root = tmp_path / "journal"
    if "removal" in place or "mark" in place:
        assert lived(root, valkey_server, place) == 0, "nothing to remove yet"
    assert lived(root, valkey_server, place) == -9
    store = Store(parse(valkey_server.url))
    await store.start()
    written = {record.request_id for folder in journals(root) for record in recover(folder)} | set(await raw(store))
    assert lived(root, valkey_server, "none") == 0
    found = await raw(store)
    assert set(found.values()) == {1}
    assert set(found) >= written, "what was written before a death is there"
    of_the_last = Counter(name.split("-")[1] for name in found.keys() - written)
    assert list(of_the_last.values()) == [RECORDS]
    assert await total(root, store) == (len(found), 100 * len(found), 10 * len(found))
    marks = await store.call("HLEN", shipping.marks_key(store))
    assert marks <= 2, "at most the mark of one whose journal went just before its process"
    await store.close()
