"""The key ring: every key of the installation in memory, asked once per request.

Kept is only HMAC-SHA256(pepper, key), in the records (`records`), whose text is `forms` and whose file is `keyfile`.
A generated key is found by the id in it, a configured one by its digest; both are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from gateway.identity.forms import PRESENTED_MAX_CHARS, generated, id_of, intact, new_id, new_key
from gateway.identity.keyfile import Kept, KeyFile, KeyFileError, Mark, pepper_id
from gateway.identity.principals import ADMIN, Principal
from gateway.identity.records import KeyRecord, Records, merged

__all__ = ["KeyFileError", "KeyRecord", "KeyRing", "generated", "intact"]


class HasValue(Protocol):
    """What a configured key must offer: its text (`gateway.config.Secret`)."""

    @property
    def value(self) -> str: ...


class _Entry:
    """What a presented key is proved against: the keyed hash to use, and (digest, principal) of each text."""

    __slots__ = ("mac", "proofs")

    def __init__(self, mac: hmac.HMAC, proofs: tuple[tuple[bytes, Principal | None], ...]) -> None:
        self.mac = mac
        self.proofs = proofs


class KeyRing:
    """Keys by id, and those of the environment. `load` replaces the records; `change` also writes them."""

    __slots__ = (
        "_by_digest",
        "_by_id",
        "_configured_by_id",
        "_mac",
        "_macs",
        "_nobody",
        "_peppers",
        "_proven",
        "_salt",
        "configured",
        "file",
        "mark",
        "own_pepper",
        "records",
    )

    def __init__(self, data_dir: Path, pepper: bytes, records: Iterable[KeyRecord] = ()) -> None:
        self.file = KeyFile(data_dir)
        #: the file as it was when it was read or written last
        self.mark: Mark | None = None
        self.own_pepper = pepper_id(pepper)
        self.records: Records = {}
        self.configured: dict[str, Principal] = {}  # keys of the environment, by their ids
        self._peppers: dict[str, bytes] = {self.own_pepper: pepper}
        # A keyed hash to copy: half the cost of setting the key up for each request.
        self._mac = hmac.new(pepper, digestmod="sha256")
        self._macs = {self.own_pepper: self._mac}
        #: stands in for an unknown key, so that it costs the same hash and the same comparison
        self._nobody = _Entry(self._mac, ((bytes(32), None),))
        self._by_id: dict[bytes, _Entry] = {}
        self._configured_by_id: dict[bytes, _Entry] = {}
        self._by_digest: dict[bytes, _Entry] = {}
        # Keys that were proven once are known again by a keyed hash a third as dear, under a key of this process.
        self._salt = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=32)
        self._proven: dict[bytes, Principal] = {}
        self.load(Kept({record.id: record for record in records}))

    @classmethod
    def open(cls, data_dir: Path, env_keys: Iterable[tuple[str, HasValue]] = ()) -> KeyRing:
        """The keys in `data_dir`, which is made if need be (mode 0700), and `env_keys`, which never reach the disk.

        Raises KeyFileError if a file is damaged or others may read it, OSError if the directory cannot be used.
        """
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = KeyFile(data_dir)
        with file.lock():
            kept = file.read()
            pepper = file.pepper(needed=bool(kept.records))
            mark = file.mark()
        ring = cls(data_dir, pepper)
        ring.load(kept)
        ring.mark = mark
        ring.configure(env_keys)
        return ring

    def __len__(self) -> int:
        return len(self.records) + len(self.configured)

    def __repr__(self) -> str:
        return f"<KeyRing {len(self)} keys, {self.file.data_dir}>"

    # -- asked by each request ----------------------------------------------------------------------------------

    def authenticate(self, presented: str | bytes, now_unix_s: float) -> Principal | None:
        """Who presents this key, or None. Takes the same work whether or not the key is known."""
        raw = _bytes(presented)
        if raw is None:
            return None
        mark = self._mark_of(raw)
        principal = self._proven.get(mark)
        if principal is None:
            principal = self._prove(raw)
            if principal is None:
                return None
            self._proven[mark] = principal  # as many as there are keys, not as are tried
        if principal.expires_at is not None and principal.expires_at <= now_unix_s:
            return None
        return principal

    def proven(self, presented: str | bytes, now_unix_s: float) -> Principal | None:
        """The same, only if this key was proven before; costs no proof."""
        raw = _bytes(presented)
        principal = None if raw is None else self._proven.get(self._mark_of(raw))
        if principal is None or (principal.expires_at is not None and principal.expires_at <= now_unix_s):
            return None
        return principal

    def _mark_of(self, presented: bytes) -> bytes:
        quick = self._salt.copy()
        quick.update(presented)
        return quick.digest()

    def _prove(self, presented: bytes) -> Principal | None:
        if not generated(presented):
            digest = _digest(self._mac, presented)
            entry = self._by_digest.get(digest, self._nobody)
        elif intact(presented):
            entry = self._by_id.get(id_of(presented), self._nobody)
            digest = _digest(entry.mac, presented)
        else:
            return None
        found = None
        for kept, principal in entry.proofs:
            if hmac.compare_digest(kept, digest):
                found = principal
        return found

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def kept(self) -> Kept:
        """All records, and the peppers of other hosts."""
        return Kept(self.records, {id: one for id, one in self._peppers.items() if id != self.own_pepper})

    def load(self, kept: Kept) -> None:
        """Hold these records instead of those before. Keys of the environment stay."""
        unchanged: Records = self.records
        if not self._macs.keys() >= kept.peppers.keys():
            unchanged = {}
            for id, pepper in kept.peppers.items():
                self._peppers.setdefault(id, pepper)
                self._macs.setdefault(id, hmac.new(pepper, digestmod="sha256"))
        by_id = dict(self._configured_by_id)
        for record in kept.records.values():
            key = record.id.encode()
            if unchanged.get(record.id) is record and key in self._by_id:
                by_id[key] = self._by_id[key]
                continue
            mac = self._macs.get(record.pepper or self.own_pepper)
            if mac is None or record.revoked_at is not None:
                continue
            now = record.principal()
            before = ((bytes.fromhex(old.digest), record.principal(old.valid_until)) for old in record.previous)
            by_id[key] = _Entry(mac, ((bytes.fromhex(record.digest), now), *before))
        self.records = kept.records
        self._by_id = by_id
        self._proven.clear()

    def configure(self, env_keys: Iterable[tuple[str, HasValue]]) -> None:
        """Accept these keys of the environment instead of those before. They never reach the disk."""
        kept = self.kept
        self.configured = {}
        self._configured_by_id = {}
        self._by_digest = {}
        for name, secret in env_keys:
            self._configure(name, secret.value.encode())
        self.records = {}  # none of them is to be found as it was: a key of the environment may have hidden it
        self.load(kept)

    def _configure(self, name: str, key: bytes) -> None:
        principal = Principal(name, f"env:{name}")
        digest = _digest(self._mac, key)
        self.configured[principal.key_id] = principal
        entry = _Entry(self._mac, ((digest, principal),))
        if generated(key):  # one made elsewhere, and named in the environment here
            self._configured_by_id[id_of(key)] = self._by_id[id_of(key)] = entry
        else:
            self._by_digest[digest] = entry
        self._proven.clear()

    # -- new and changed keys -----------------------------------------------------------------------------------

    def make_key(self, name: str, **fields: Any) -> tuple[str, KeyRecord]:
        """A new key and the record of it, with further `fields` of KeyRecord. Neither is stored."""
        id = new_id()
        key = new_key(id)
        digest = _digest(self._mac, key.encode()).hex()
        return key, KeyRecord(id, name, digest, int(time.time()), pepper=self.own_pepper, **fields)

    def pepper_of(self, record: KeyRecord) -> bytes | None:
        """The pepper of `record`, None if it is not known here."""
        return self._peppers.get(record.pepper or self.own_pepper)

    def new_text(self, record: KeyRecord) -> tuple[str, str]:
        """Another text for the key of `record`, whose pepper is known here, and its digest."""
        key = new_key(record.id)
        return key, _digest(self._macs[record.pepper or self.own_pepper], key.encode()).hex()

    def change(self, edit: Callable[[Records], Iterable[KeyRecord]]) -> None:
        """Store the records that `edit` makes of the present ones, and hold them from now on.

        Raises KeyFileError or OSError, or what `edit` raises; then nothing changed. Blocks: reads and writes files.
        """
        self.adopt(*self.store(edit))

    def store(self, edit: Callable[[Records], Iterable[KeyRecord]]) -> tuple[Kept, Mark | None]:
        """The first half of `change`, which changes files only, so a thread may do it: gives what `adopt` takes.

        `edit` is called under the lock of the data directory, with what all processes stored.
        """
        with self.file.lock():
            found = self.file.read()
            records = merged(found.records, self.records.values())
            after = Kept(merged(records, edit(records)), {**self.kept.peppers, **found.peppers})
            if after != found:
                self.file.write(after)
            return after, self.file.mark()

    def adopt(self, kept: Kept, mark: Mark | None) -> None:
        """Hold `kept` together with what is held now; `mark` is that of the file it came from."""
        self.mark = mark
        records = merged(self.records, kept.records.values())
        if records != self.records or not self._peppers.keys() >= kept.peppers.keys():
            self.load(Kept(records, kept.peppers))

    def add(self, record: KeyRecord) -> None:
        """Store the record and accept its key from now on. Raises KeyFileError or OSError; then nothing changed."""
        self.change(lambda _: [record])

    def ensure_first_key(self) -> str | None:
        """Make and store a key with the role "admin" if there is no key at all, and return its text, which exists
        nowhere else.

        None if any key exists, configured ones included. Of several processes that start at once, one makes it.
        """
        if self:
            return None
        made: list[str] = []

        def first(records: Records) -> list[KeyRecord]:
            if records:  # another process was faster
                return []
            key, record = self.make_key("first", roles=(ADMIN,))
            made.append(key)
            return [record]

        self.change(first)
        return made[0] if made else None


def _bytes(presented: str | bytes) -> bytes | None:
    if len(presented) > PRESENTED_MAX_CHARS:
        return None
    if isinstance(presented, bytes):
        return presented
    try:
        return presented.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None


def _digest(mac: hmac.HMAC, key: bytes) -> bytes:
    mac = mac.copy()
    mac.update(key)
    return mac.digest()
