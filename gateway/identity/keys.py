"""API keys: how they are made, kept and recognised.

A generated key is `llmgw_<id>_<secret><checksum>`: a public id of 10 base32 characters, 32 random bytes in base62, and
the CRC-32 of all before it in hexadecimal, so that a mistyped key, or a false find of a secret scanner, is told from a
real one without any look-up. Keys from `GATEWAY_API_KEYS` may have any form.

Kept is only HMAC-SHA256(pepper, key). The pepper is made once per installation and lies beside the records:

    <data_dir>/pepper      32 bytes, mode 0600
    <data_dir>/keys.json   {"version": 1, "keys": [{"id", "name", "digest", "created_unix_s", "roles", "models"}]}

Both are written whole (a new file, synced, renamed) under a lock that other processes respect.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import string
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from gateway.identity.principals import Principal

PREFIX: Final = "llmgw_"
#: a longer credential is no key: refused before any work is done for it (the configuration takes none longer)
PRESENTED_MAX_CHARS: Final = 512

_ID_CHARS: Final = 10
_SECRET_BYTES: Final = 32
_SECRET_CHARS: Final = 43  # 62**43 > 256**32
_CHECKSUM_CHARS: Final = 8
_KEY_CHARS: Final = len(PREFIX) + _ID_CHARS + 1 + _SECRET_CHARS + _CHECKSUM_CHARS
_PREFIX_BYTES: Final = PREFIX.encode()
_BASE32: Final = string.ascii_lowercase + "234567"
_BASE62: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PEPPER_BYTES: Final = 32


class KeyFileError(Exception):
    """The key files cannot be trusted or read. The message names the file and what to do; nothing was changed."""


class HasValue(Protocol):
    """What a configured key must offer: its text (`gateway.config.Secret`)."""

    @property
    def value(self) -> str: ...


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key. `digest` is HMAC-SHA256 in hexadecimal; `models` None allows all."""

    id: str
    name: str
    digest: str
    created_unix_s: int
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    keys: list[KeyRecord]


def generated(key: bytes) -> bool:
    """Whether `key` has the form of a generated key; its checksum may still be wrong."""
    return len(key) == _KEY_CHARS and key.startswith(_PREFIX_BYTES)


def intact(key: bytes) -> bool:
    """Whether the checksum at the end of a generated key is right."""
    return b"%08x" % zlib.crc32(key[:-_CHECKSUM_CHARS]) == key[-_CHECKSUM_CHARS:]


class KeyRing:
    """Every key of the installation, in memory; asked once per request."""

    __slots__ = ("_by_digest", "_data_dir", "_mac", "_proven", "_records", "_salt")

    def __init__(self, data_dir: Path, pepper: bytes, records: Iterable[KeyRecord] = ()) -> None:
        self._data_dir = data_dir
        # A keyed hash to copy: half the cost of setting the key up for each request.
        self._mac = hmac.new(pepper, digestmod="sha256")
        self._records = list(records)
        self._by_digest: dict[bytes, tuple[bytes, Principal]] = {}
        # Keys that were proven once are known again by a keyed hash a third as dear, under a key of this process.
        self._salt = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=32)
        self._proven: dict[bytes, Principal] = {}
        for record in self._records:
            self._admit(bytes.fromhex(record.digest), _principal(record))

    @classmethod
    def open(cls, data_dir: Path, env_keys: Iterable[tuple[str, HasValue]] = ()) -> KeyRing:
        """The keys in `data_dir`, which is made if need be (mode 0700), and `env_keys`, which never reach the disk.

        Raises KeyFileError if a file is damaged or others may read it, OSError if the directory cannot be used.
        """
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(data_dir):
            records = _read_records(data_dir)
            pepper = _read_pepper(data_dir, needed=bool(records))
        ring = cls(data_dir, pepper, records)
        for name, secret in env_keys:
            ring._admit(ring._digest(secret.value.encode()), Principal(name, f"env:{name}"))
        return ring

    def __len__(self) -> int:
        return len(self._by_digest)

    def __repr__(self) -> str:
        return f"<KeyRing {len(self)} keys, {self._data_dir}>"

    def authenticate(self, presented: str | bytes) -> Principal | None:
        """Who presents this key, or None. Takes the same work whether or not the key is known."""
        if len(presented) > PRESENTED_MAX_CHARS:
            return None
        if isinstance(presented, str):
            try:
                presented = presented.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                return None
        quick = self._salt.copy()
        quick.update(presented)
        mark = quick.digest()
        principal = self._proven.get(mark)
        if principal is None:
            principal = self._prove(presented)
            if principal is not None:
                self._proven[mark] = principal  # as many as there are keys, not as are tried
        return principal

    def _prove(self, presented: bytes) -> Principal | None:
        if generated(presented) and not intact(presented):
            return None
        digest = self._digest(presented)
        kept, principal = self._by_digest.get(digest, _NOBODY)
        return principal if hmac.compare_digest(kept, digest) else None

    def make_key(self, name: str) -> tuple[str, KeyRecord]:
        """A new key and the record of it. Neither is stored: `add` does that."""
        id = "".join(secrets.choice(_BASE32) for _ in range(_ID_CHARS))
        body = f"{PREFIX}{id}_{_base62(secrets.token_bytes(_SECRET_BYTES))}"
        key = f"{body}{zlib.crc32(body.encode()):08x}"
        return key, KeyRecord(id, name, self._digest(key.encode()).hex(), int(time.time()))

    def add(self, record: KeyRecord) -> None:
        """Store the record and accept its key from now on. Raises KeyFileError or OSError; then nothing changed."""
        with _lock(self._data_dir):
            self._store(_read_records(self._data_dir), record)

    def ensure_first_key(self) -> str | None:
        """Make and store a key if there is none at all, and return its text, which exists nowhere else.

        None if any key exists, configured ones included. Of several processes that start at once, one makes it.
        """
        if self._by_digest:
            return None
        with _lock(self._data_dir):
            records = _read_records(self._data_dir)
            if not records:
                key, record = self.make_key("first")
                self._store(records, record)
                return key
            for found in records:  # another process was faster
                self._remember(found)
        return None

    def _digest(self, key: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(key)
        return mac.digest()

    def _store(self, stored: list[KeyRecord], record: KeyRecord) -> None:
        _write(self._data_dir / "keys.json", _encode([*stored, record]))
        self._remember(record)

    def _remember(self, record: KeyRecord) -> None:
        self._records.append(record)
        self._admit(bytes.fromhex(record.digest), _principal(record))

    def _admit(self, digest: bytes, principal: Principal) -> None:
        self._by_digest[digest] = (digest, principal)
        self._proven.clear()


#: stands in for an unknown key, so that it costs the same comparison
_NOBODY: Final[tuple[bytes, Principal | None]] = (bytes(32), None)


def _principal(record: KeyRecord) -> Principal:
    models = None if record.models is None else frozenset(record.models)
    return Principal(record.name, record.id, frozenset(record.roles), models)


def _base62(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits = []
    for _ in range(_SECRET_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(digits)


def _encode(records: list[KeyRecord]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_File(1, records)), indent=1) + b"\n"


def _read_records(data_dir: Path) -> list[KeyRecord]:
    path = data_dir / "keys.json"
    raw = _read_private(path)
    if raw is None:
        return []
    remedy = "restore it from a backup, or move it away to start with no keys"
    try:
        file = msgspec.json.decode(raw, type=_File)
        if any(len(bytes.fromhex(record.digest)) != 32 for record in file.keys):
            raise ValueError("a digest has not 32 bytes")
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise KeyFileError(f"{path} is damaged ({error}): {remedy}") from None
    if file.version != 1:
        raise KeyFileError(f"{path} has version {file.version}, this program reads version 1")
    return file.keys


def _read_pepper(data_dir: Path, *, needed: bool) -> bytes:
    """The installation's pepper, made if there are no records that would be lost without the old one."""
    path = data_dir / "pepper"
    pepper = _read_private(path)
    if pepper is None:
        if needed:
            raise KeyFileError(f"{path} is missing, and no key in keys.json works without it: restore it from a backup")
        pepper = secrets.token_bytes(_PEPPER_BYTES)
        _write(path, pepper)
    if len(pepper) != _PEPPER_BYTES:
        raise KeyFileError(f"{path} is damaged: {len(pepper)} bytes, not {_PEPPER_BYTES}; restore it from a backup")
    return pepper


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


@contextmanager
def _lock(data_dir: Path) -> Iterator[None]:
    """Hold the directory's lock against other processes (released by the system if this one dies)."""
    file = os.open(data_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
