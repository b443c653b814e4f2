"""The key files of an installation, in its data directory:

    pepper      32 random bytes, made once: the key of the HMAC under which keys are kept
    keys.json   {"version": 2, "peppers": {id: hex}, "keys": [KeyRecord …]}

`peppers` are those of other hosts that share their keys through a store. Both files have mode 0600 and are written
whole (a new file, synced, renamed) under a lock that other processes respect. Version 1 of keys.json is read; the
next write makes it version 2.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from gateway.identity.records import KeyRecord, Records, check

PEPPER_BYTES: Final = 32
VERSION: Final = 2

Mark = tuple[int, int, int]


class KeyFileError(Exception):
    """The key files cannot be trusted or read. The message names the file and what to do; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The records by id, and the peppers of other hosts by their ids."""

    records: Records = field(default_factory=dict)
    peppers: Mapping[str, bytes] = field(default_factory=dict)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    keys: list[KeyRecord]
    peppers: dict[str, str] = {}


class _OldKey(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    name: str
    digest: str
    created_unix_s: int
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None


class _OldFile(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    keys: list[_OldKey]


class _Version(msgspec.Struct):
    version: int


def pepper_id(pepper: bytes) -> str:
    """Names a pepper without telling anything of it."""
    return hashlib.sha256(b"the id of a pepper:" + pepper).hexdigest()[:12]


class KeyFile:
    """`read` and `write` raise KeyFileError or OSError; hold `lock` from the reading to the writing."""

    __slots__ = ("_path", "_pepper_path", "data_dir")

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._path = data_dir / "keys.json"
        self._pepper_path = data_dir / "pepper"

    def mark(self) -> Mark | None:
        """Another value whenever the file is another, as each write makes it; None without a file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self) -> Kept:
        path = self._path
        raw = _read_private(path)
        if raw is None:
            return Kept()
        remedy = "restore it from a backup, or move it away to start with no keys"
        try:
            version = msgspec.json.decode(raw, type=_Version).version
            if version == 1:
                old = msgspec.json.decode(raw, type=_OldFile).keys
                records = [KeyRecord(o.id, o.name, o.digest, o.created_unix_s, o.roles, o.models) for o in old]
                peppers = {}
            elif version == VERSION:
                file = msgspec.json.decode(raw, type=_File)
                records = file.keys
                peppers = {id: bytes.fromhex(pepper) for id, pepper in file.peppers.items()}
            else:
                raise KeyFileError(f"{path} has version {version}, this program reads versions 1 and {VERSION}")
            for record in records:
                check(record)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise KeyFileError(f"{path} is damaged ({error}): {remedy}") from None
        if not all(record.pepper for record in records):  # version 1 knew one pepper
            own = pepper_id(self.pepper(needed=True))
            records = [record if record.pepper else replace(record, pepper=own) for record in records]
        return Kept({record.id: record for record in records}, peppers)

    def write(self, kept: Kept) -> None:
        peppers = {id: pepper.hex() for id, pepper in kept.peppers.items()}
        content = msgspec.json.encode(_File(VERSION, list(kept.records.values()), peppers))
        _write(self._path, msgspec.json.format(content, indent=1) + b"\n")

    def pepper(self, *, needed: bool) -> bytes:
        """The installation's pepper, made unless it is `needed` for records that are there."""
        path = self._pepper_path
        pepper = _read_private(path)
        if pepper is None:
            if needed:
                raise KeyFileError(
                    f"{path} is missing, and no key in keys.json works without it: restore it from a backup"
                )
            pepper = secrets.token_bytes(PEPPER_BYTES)
            _write(path, pepper)
        if len(pepper) != PEPPER_BYTES:
            raise KeyFileError(f"{path} is damaged: {len(pepper)} bytes, not {PEPPER_BYTES}; restore it from a backup")
        return pepper

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory's lock against other processes (released by the system if this one dies)."""
        file = os.open(self.data_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _read_private(path: Path) -> bytes | None:
    """The file's bytes, None if there is none; KeyFileError if group or others may touch it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(file, "rb") as stream:
        mode = stat.S_IMODE(os.fstat(file).st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{path} has mode {mode:04o}, so others may read it: chmod 600 {path}")
        return stream.read()


def _write(path: Path, content: bytes) -> None:
    """Replace the file whole, readable by its owner only. A crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # or the rename may not outlive a power cut
    finally:
        os.close(directory)
