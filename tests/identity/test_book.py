"""Keys as they change: every process hears of it, nothing is lost, and what is revoked stays so."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.config import Secret
from gateway.errors import GatewayError
from gateway.identity.book import KeyBook
from gateway.identity.keys import KeyRing
from gateway.identity.records import KeyRecord, Previous, decode, encode, later, merged
from gateway.identity.shared import Shared, connected
from gateway.limits.spec import Budget, Limit
from tests.store_fixtures import Server

NOW = 2_000_000_000.0
DIGEST = "ab" * 32


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def book(data_dir: Path, shared: Shared | None = None, **more: object) -> KeyBook:
    return KeyBook(KeyRing.open(data_dir), shared, clock=Clock(), every_s=0.05, **more)  # type: ignore[arg-type]


async def until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


# -- records --------------------------------------------------------------------------------------------------------


def test_a_record_survives_its_encoding() -> None:
    whole = KeyRecord(
        "a", "n", DIGEST, 1.0, ("admin",), ("m",), "p", "g", (Limit("l", "key", "requests", 1, 2.0),),
        Budget(1.0, "tokens", "day"), 9.0, {"b": "1", "a": "2"}, None, (Previous(DIGEST, 5.0),), 3, "low", 2.0,
    )  # fmt: skip
    assert decode(encode(whole)) == whole
    assert encode(whole) == encode(dataclasses.replace(whole, metadata={"a": "2", "b": "1"}))
    principal = whole.principal()
    assert (principal.group, principal.limits, principal.budget) == ("g", whole.limits, whole.budget)
    assert principal.expires_at == 9.0
    assert whole.principal(5.0).expires_at == 5.0
    assert whole.principal(10.0).expires_at == 9.0


def test_the_later_record_holds_in_whatever_order_they_come() -> None:
    one = KeyRecord("a", "one", DIGEST, 1.0, revision=2)
    more = [
        KeyRecord("a", "zzz", DIGEST, 1.0, revision=1),
        KeyRecord("a", "two", DIGEST, 1.0, revision=2),
        KeyRecord("a", "aaa", DIGEST, 1.0, revision=2, revoked_at=5.0),
    ]
    for other in more:
        assert later(one, other) == later(other, one)
    revoked = more[-1]
    assert merged({"a": one}, more)["a"] == merged({"a": revoked}, [one, *more[:2]])["a"] == revoked
    assert later(revoked, dataclasses.replace(one, revision=3)).revision == 3


# -- one process ----------------------------------------------------------------------------------------------------


async def test_rotation_overlaps_and_keeps_the_id(tmp_path: Path) -> None:
    here = book(tmp_path)
    first, made = await here.create({"name": "ci"})
    second, record = await here.rotate(made.id, 60.0)
    assert (record.id, record.name, record.revision) == (made.id, "ci", 2)
    assert second[:16] == first[:16]
    assert second != first
    ring = here.ring
    for text, now, known in [(first, NOW + 59, True), (first, NOW + 60, False), (second, NOW + 1e6, True)]:
        for one in (ring, KeyRing.open(tmp_path)):
            assert (one.authenticate(text, now) is not None) is known
    third, _ = await here.rotate(made.id, 0.0)  # nothing overlaps; what overlapped before still does
    assert ring.authenticate(second, NOW) is None
    assert ring.authenticate(first, NOW) is not None
    assert ring.authenticate(third, NOW) is not None


async def test_no_more_than_four_texts_are_accepted(tmp_path: Path) -> None:
    here = book(tmp_path)
    text, made = await here.create({"name": "ci"})
    texts = [text, *[(await here.rotate(made.id, 60.0))[0] for _ in range(5)]]
    assert [here.ring.authenticate(one, NOW) is not None for one in texts] == [False, False, True, True, True, True]


async def test_a_key_expires_though_it_was_proven(tmp_path: Path) -> None:
    here = book(tmp_path)
    text, made = await here.create({"name": "ci", "expires_at": NOW + 10})
    assert here.ring.authenticate(text, NOW + 9.9) is not None
    assert here.ring.proven(text, NOW + 9.9) is not None
    assert here.ring.authenticate(text, NOW + 10) is None
    assert here.ring.proven(text, NOW + 10) is None
    assert made.status(NOW) == "active"
    assert made.status(NOW + 10) == "expired"
    # an overlap does not outlive it
    await here.rotate(made.id, 1000.0)
    assert here.ring.authenticate(text, NOW + 10) is None


async def test_what_is_proven_is_forgotten_with_every_change(tmp_path: Path) -> None:
    here = book(tmp_path)
    text, made = await here.create({"name": "ci"})
    assert here.ring.proven(text, NOW) is None
    before = here.ring.authenticate(text, NOW)
    assert here.ring.proven(text, NOW) is before
    await here.edit(made.id, {"models": ("a",)})
    changed = here.ring.authenticate(text, NOW)
    assert changed is not None
    assert changed.models == {"a"}
    await here.revoke(made.id)
    assert here.ring.authenticate(text, NOW) is None
    assert KeyRing.open(tmp_path).authenticate(text, NOW) is None


async def test_an_edit_rebuilds_only_what_it_changes(tmp_path: Path) -> None:
    here = book(tmp_path)
    _, one = await here.create({"name": "one"})
    _, two = await here.create({"name": "two"})
    before = dict(here.ring._by_id)
    await here.edit(two.id, {"group": "g"})
    assert here.ring._by_id[one.id.encode()] is before[one.id.encode()]
    assert here.ring._by_id[two.id.encode()] is not before[two.id.encode()]


async def test_what_cannot_be_done(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path, [("conf", Secret("a-key-of-the-environment"))])
    here = KeyBook(ring, clock=Clock())
    _, made = await here.create({"name": "ci"})
    _, gone = await here.create({"name": "gone"})
    revoked = await here.revoke(gone.id)
    assert await here.revoke(gone.id) == revoked
    for call, status, code in [
        (here.create({"name": "ci"}), 400, "invalid_field"),
        (here.create({"name": "conf"}), 400, "invalid_field"),
        (here.edit(made.id, {"name": "conf"}), 400, "invalid_field"),
        (here.edit("nonesuch", {"name": "x"}), 404, "key_not_found"),
        (here.rotate("nonesuch", 1.0), 404, "key_not_found"),
        (here.revoke("nonesuch"), 404, "key_not_found"),
        (here.edit(gone.id, {"group": "x"}), 409, "key_conflict"),
        (here.rotate(gone.id, 1.0), 409, "key_conflict"),
    ]:
        with pytest.raises(GatewayError) as caught:
            await call
        assert (caught.value.status, caught.value.code) == (status, code)
    await here.create({"name": "gone"})  # the name of a revoked key is free
    await here.edit(made.id, {"name": "ci", "group": "g"})  # its own name is no other's


def test_an_unknown_id_costs_what_a_known_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the same hashes and comparisons."""
    ring = KeyRing.open(tmp_path)
    _, record = ring.make_key("known")
    ring.add(record)
    wrong = ring.new_text(record)[0]  # another secret under a known id
    stranger = ring.make_key("stranger")[0]
    import gateway.identity.keys as keys

    calls: list[str] = []
    digest, compare = keys._digest, keys.hmac.compare_digest
    monkeypatch.setattr(keys, "_digest", lambda *args: calls.append("digest") or digest(*args))
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda *args: calls.append("compare") or compare(*args))
    work = []
    for text in (wrong, stranger, "a-key-like-those-of-the-environment"):
        assert ring.authenticate(text, NOW) is None
        work.append(tuple(calls))
        calls.clear()
    assert set(work) == {("digest", "compare")}


def test_version_1_is_read_and_upgraded(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key, record = ring.make_key("old")
    old = {"id": record.id, "name": "old", "digest": record.digest, "created_unix_s": 5, "roles": [], "models": ["m"]}
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"version": 1, "keys": [old]}))
    file.chmod(0o600)
    ring = KeyRing.open(tmp_path)
    principal = ring.authenticate(key, NOW)
    assert principal is not None
    assert (principal.models, principal.roles) == ({"m"}, frozenset())
    ring.add(ring.make_key("new")[1])
    assert json.loads(file.read_text())["version"] == 2
    assert KeyRing.open(tmp_path).authenticate(key, NOW) == principal


# -- several processes on one data directory -----------------------------------------------------------------------

CREATE = """
import asyncio, sys
from pathlib import Path
from gateway.identity.book import KeyBook
from gateway.identity.keys import KeyRing
async def main():
    book = KeyBook(KeyRing.open(Path(sys.argv[1])))
    sys.stdin.read()
    for number in range(10):
        key, _ = await book.create({"name": f"{sys.argv[2]}-{number}"})
        print(key)
asyncio.run(main())
"""


def test_four_processes_that_create_keys_at_once_lose_none(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, str(tmp_path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    keys: list[str] = []
    for process in started:
        assert process.stdout is not None
        keys += process.stdout.read().split()
        process.stdout.close()
        assert process.wait(20) == 0
    assert len(set(keys)) == 40
    ring = KeyRing.open(tmp_path)
    assert len(ring.records) == 40
    assert all(ring.authenticate(key, NOW) for key in keys)


async def test_changes_reach_a_process_that_shares_only_the_data_directory(tmp_path: Path) -> None:
    one, other = book(tmp_path), book(tmp_path)
    await other.start()
    try:
        text, made = await one.create({"name": "ci"})
        await until(lambda: other.ring.authenticate(text, NOW) is not None)
        await one.revoke(made.id)
        await until(lambda: other.ring.authenticate(text, NOW) is None)
    finally:
        await other.stop()


async def test_a_damaged_file_leaves_the_keys_valid_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = book(tmp_path)
    text, _ = await here.create({"name": "ci"})
    good = (tmp_path / "keys.json").read_bytes()
    (tmp_path / "keys.json").write_bytes(b"{")
    for _ in range(3):
        await here.sync()
        assert here.ring.authenticate(text, NOW) is not None
    told = [record.getMessage() for record in caplog.records if record.name == "gateway.keys"]
    assert len(told) == 1
    assert told[0].startswith(f"keys may be out of date: {tmp_path}/keys.json is damaged (")
    (tmp_path / "keys.json").write_bytes(good)
    await here.sync()
    assert here.ring.authenticate(text, NOW) is not None


async def test_a_fault_while_looking_does_not_end_the_following(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = book(tmp_path), book(tmp_path)
    await other.start()
    try:

        def fault(self: object) -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr("gateway.identity.keyfile.KeyFile.mark", fault)
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.2)
        monkeypatch.undo()
        assert len(caplog.records) == 1
        text, _ = await one.create({"name": "ci"})
        await until(lambda: other.ring.authenticate(text, NOW) is not None)
    finally:
        await other.stop()


async def test_woken_it_looks_at_once(tmp_path: Path) -> None:
    one = book(tmp_path)
    other = KeyBook(KeyRing.open(tmp_path), every_s=60.0)
    await other.start()
    try:
        text, _ = await one.create({"name": "ci"})
        await asyncio.sleep(0.1)
        assert other.ring.authenticate(text, NOW) is None
        other.wake()
        await until(lambda: other.ring.authenticate(text, NOW) is not None)
    finally:
        await other.stop()


# -- several hosts on one store -------------------------------------------------------------------------------------


async def test_hosts_that_share_a_store_share_keys_made_under_their_own_peppers(
    tmp_path: Path, store_server: Server
) -> None:
    async with connected(store_server.url) as first, connected(store_server.url) as second:
        one, other = book(tmp_path / "1", first), book(tmp_path / "2", second)
        text, made = await one.create({"name": "one", "group": "g"})
        await other.sync()
        principal = other.ring.authenticate(text, NOW)
        assert principal is not None
        assert (principal.key_id, principal.group) == (made.id, "g")
        # the other way, and an edit of what was made elsewhere
        more, _ = await other.create({"name": "two"})
        turned, _ = await other.rotate(made.id, 0.0)
        await one.sync()
        assert one.ring.authenticate(more, NOW) is not None
        assert one.ring.authenticate(turned, NOW) is not None
        assert one.ring.authenticate(text, NOW) is None
        await one.revoke(made.id)
        await other.sync()
        assert other.ring.authenticate(turned, NOW) is None
    # each host's copy serves without the store, after a restart too
    for folder in ("1", "2"):
        ring = KeyRing.open(tmp_path / folder)
        assert ring.authenticate(more, NOW) is not None
        assert ring.authenticate(turned, NOW) is None


async def test_a_name_is_taken_on_every_host(tmp_path: Path, valkey_server: Server) -> None:
    async with connected(valkey_server.url) as first, connected(valkey_server.url) as second:
        await book(tmp_path / "1", first).create({"name": "ci"})
        with pytest.raises(GatewayError, match="name of another key"):
            await book(tmp_path / "2", second).create({"name": "ci"})


async def test_while_the_store_is_away_keys_stay_valid_and_changes_wait(tmp_path: Path, valkey_server: Server) -> None:
    async with connected(valkey_server.url) as first, connected(valkey_server.url) as second:
        one, other = book(tmp_path / "1", first), book(tmp_path / "2", second)
        text, made = await one.create({"name": "one"})
        await other.sync()
        valkey_server.kill()
        await one.sync()
        assert one.ring.authenticate(text, NOW) is not None
        offline, _ = await one.create({"name": "offline"})
        await one.revoke(made.id)
        await other.edit(made.id, {"group": "late"})  # the same revision as the revocation: that one wins
        assert one.ring.authenticate(text, NOW) is None
        assert one.ring.authenticate(offline, NOW) is not None
        valkey_server.start()
        await until(lambda: not first.trouble and not second.trouble)
        for _ in range(3):
            await other.sync()
            await one.sync()
        assert other.ring.authenticate(text, NOW) is None
        assert other.ring.authenticate(offline, NOW) is not None
        assert one.ring.records == other.ring.records


async def test_a_store_that_lost_everything_is_filled_again(tmp_path: Path, valkey_server: Server) -> None:
    async with connected(valkey_server.url) as first, connected(valkey_server.url) as second:
        one = book(tmp_path / "1", first)
        text, _ = await one.create({"name": "one"})
        await one.sync()
        assert valkey_server.ask("FLUSHALL") == b"+OK\r\n"
        await one.sync()
        other = book(tmp_path / "2", second)
        await other.sync()
        assert other.ring.authenticate(text, NOW) is not None


async def test_edits_of_one_key_on_two_hosts_at_once_are_all_kept(tmp_path: Path, valkey_server: Server) -> None:
    async with connected(valkey_server.url) as first, connected(valkey_server.url) as second:
        one, other = book(tmp_path / "1", first), book(tmp_path / "2", second)
        _, made = await one.create({"name": "ci"})
        await other.sync()
        await asyncio.gather(
            *(one.edit(made.id, {"group": f"g{n}"}) for n in range(5)),
            *(other.edit(made.id, {"metadata": {"n": str(n)}}) for n in range(5)),
        )
        await one.sync()
        await other.sync()
        record = one.find(made.id)
        assert record == other.find(made.id)
        assert (record.revision, record.group, record.metadata) == (11, "g4", {"n": "4"})


async def test_no_text_of_a_key_is_in_the_store_or_on_disk(tmp_path: Path, valkey_server: Server) -> None:
    async with connected(valkey_server.url) as shared:
        here = book(tmp_path, shared)
        text, made = await here.create({"name": "ci"})
        again, _ = await here.rotate(made.id, 60.0)
        stored = repr(await shared._store.call("HGETALL", shared._key))
        assert made.id in stored
        for one in (text, again):
            secret = one.split("_")[2]
            assert secret not in stored
            assert all(secret.encode() not in path.read_bytes() for path in tmp_path.iterdir())
