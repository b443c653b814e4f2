"""The key ring: keys are recognised, kept safely on disk, and made once."""

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Secret
from gateway.identity.keys import KeyFileError, KeyRing, generated, intact
from gateway.identity.principals import Principal

NOW = 2_000_000_000.0
ENV_KEYS = (("alice", Secret("alice-key-0123456789")), ("bob", Secret("bob-key-0123456789")))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_form_of_a_key(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key, record = ring.make_key("alice")
    assert re.fullmatch(r"llmgw_[a-z2-7]{10}_[0-9A-Za-z]{43}[0-9a-f]{8}", key)
    assert key[6:16] == record.id
    assert generated(key.encode())
    assert intact(key.encode())
    assert len({ring.make_key("x")[0] for _ in range(100)}) == 100
    assert key.split("_")[2] not in repr(record)


def test_a_stored_key_works_now_and_after_a_restart(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key, record = ring.make_key("alice")
    assert ring.authenticate(key, NOW) is None  # made, not yet added
    ring.add(record)
    expected = Principal("alice", record.id)
    assert ring.authenticate(key, NOW) == expected
    assert KeyRing.open(tmp_path).authenticate(key.encode(), NOW) == expected


def test_roles_and_models_survive(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key, record = ring.make_key("ci")
    ring.add(dataclasses.replace(record, roles=("admin",), models=("small",)))
    principal = KeyRing.open(tmp_path).authenticate(key, NOW)
    assert principal == Principal("ci", record.id, frozenset({"admin"}), frozenset({"small"}))
    assert principal.may_use("small")
    assert not principal.may_use("large")
    assert Principal("x", "y").may_use("anything")


def test_keys_of_the_environment_work_and_never_reach_the_disk(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path, ENV_KEYS)
    assert ring.authenticate("alice-key-0123456789", NOW) == Principal("alice", "env:alice")
    assert ring.ensure_first_key() is None
    assert not (tmp_path / "keys.json").exists()
    assert KeyRing.open(tmp_path).authenticate("alice-key-0123456789", NOW) is None
    assert all(b"alice" not in path.read_bytes() for path in tmp_path.iterdir())


WRONG = [
    "",
    "x",
    "alice-key-012345678",
    "alice-key-0123456789 ",
    "Alice-key-0123456789",
    "é",
    "\udcff",
    "\ud800",
    "k" * 10_000,
]


@pytest.mark.parametrize("presented", WRONG)
def test_unknown_credentials(tmp_path: Path, presented: str) -> None:
    assert KeyRing.open(tmp_path, ENV_KEYS).authenticate(presented, NOW) is None


def test_a_bad_checksum_is_refused_with_no_look_up(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key = ring.ensure_first_key()
    assert key is not None
    looked_up: list[bytes] = []

    class Watched(dict[bytes, Any]):
        def get(self, id: bytes, default: object = None) -> object:  # type: ignore[override]
            looked_up.append(id)
            return super().get(id, default)

    ring._by_id, ring._by_digest = Watched(ring._by_id), Watched(ring._by_digest)
    for index in range(6, len(key)):
        other = "b" if key[index] != "b" else "c"
        assert ring.authenticate(key[:index] + other + key[index + 1 :], NOW) is None
    assert looked_up == []
    assert ring.authenticate(key, NOW) is not None
    assert len(looked_up) == 1


def test_the_first_key_is_made_once_and_its_text_is_not_kept(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    key = ring.ensure_first_key()
    assert key is not None
    principal = ring.authenticate(key, NOW)
    assert principal is not None
    assert principal.name == "first"
    assert principal.roles == {"admin"}
    assert ring.ensure_first_key() is None
    again = KeyRing.open(tmp_path)
    assert again.ensure_first_key() is None
    assert again.authenticate(key, NOW) == principal
    secret = key.split("_")[2].encode()
    assert all(secret not in path.read_bytes() for path in tmp_path.iterdir())
    assert key not in repr(ring)


def test_modes_and_nothing_left_over(tmp_path: Path) -> None:
    data_dir = tmp_path / "a" / "data"
    previous = os.umask(0)
    try:
        KeyRing.open(data_dir).ensure_first_key()
    finally:
        os.umask(previous)
    assert mode(data_dir) == 0o700
    assert {path.name: mode(path) for path in data_dir.iterdir()} == {
        "pepper": 0o600,
        "keys.json": 0o600,
        ".lock": 0o600,
    }


@pytest.mark.parametrize("name", ["pepper", "keys.json"])
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, name: str, bits: int) -> None:
    KeyRing.open(tmp_path).ensure_first_key()
    (tmp_path / name).chmod(bits)
    with pytest.raises(KeyFileError, match=rf"{name} has mode 0{bits:o}.*chmod 600"):
        KeyRing.open(tmp_path)


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"version": 1}',
    b'{"version": 1, "keys": [{"id": "a", "name": "b", "digest": "zz", "created_unix_s": 1}]}',
    b'{"version": 1, "keys": [{"id": "a", "name": "b", "digest": "00", "created_unix_s": 1}]}',
    b'{"version": 1, "keys": [], "more": 1}',
    b'{"version": 3, "keys": []}',
    b'{"version": 2, "keys": [{"id": "a", "name": "b", "digest": "00", "created_at": 1}]}',
    b'{"version": 2, "keys": [], "peppers": {"a": "zz"}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_key_file_is_told_and_left_alone(tmp_path: Path, content: bytes) -> None:
    ring = KeyRing.open(tmp_path)
    file = tmp_path / "keys.json"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        KeyRing.open(tmp_path)
    with pytest.raises(KeyFileError):
        ring.ensure_first_key()
    with pytest.raises(KeyFileError):
        ring.add(ring.make_key("x")[1])
    assert file.read_bytes() == content
    assert len(ring) == 0


def test_a_damaged_or_lost_pepper_is_told_and_not_replaced(tmp_path: Path) -> None:
    KeyRing.open(tmp_path).ensure_first_key()
    pepper = tmp_path / "pepper"
    pepper.write_bytes(b"short")
    with pytest.raises(KeyFileError, match="5 bytes, not 32"):
        KeyRing.open(tmp_path)
    pepper.unlink()
    with pytest.raises(KeyFileError, match="missing"):
        KeyRing.open(tmp_path)
    assert not pepper.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.open(tmp_path)
    ring.ensure_first_key()
    before = (tmp_path / "keys.json").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    key, record = ring.make_key("second")
    with pytest.raises(OSError, match="No space left"):
        ring.add(record)
    assert (tmp_path / "keys.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "keys.json", "pepper"]
    assert ring.authenticate(key, NOW) is None


def test_a_link_in_place_of_a_key_file_is_not_followed(tmp_path: Path) -> None:
    data_dir, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data_dir.mkdir()
    elsewhere.write_bytes(b"x" * 32)
    elsewhere.chmod(0o600)
    (data_dir / "pepper").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"):
        KeyRing.open(data_dir)


FIRST = """
import sys
from pathlib import Path
from gateway.identity.keys import KeyRing
ring = KeyRing.open(Path(sys.argv[1]))
sys.stdin.read()
print(ring.ensure_first_key() or "", len(ring))
"""


def test_of_processes_that_start_together_one_makes_the_first_key(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    said = []
    for process in started:
        assert process.stdout is not None
        said.append(process.stdout.read().split())
        process.stdout.close()
        assert process.wait(20) == 0
    keys = [words[0] for words in said if len(words) == 2]
    assert len(keys) == 1
    assert [words[-1] for words in said] == ["1"] * 4
    assert len(json.loads((tmp_path / "keys.json").read_text())["keys"]) == 1
    assert KeyRing.open(tmp_path).authenticate(keys[0], NOW) is not None
