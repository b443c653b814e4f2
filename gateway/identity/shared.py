"""Keys in the store that several hosts share: one hash, whose fields are

    key:<id>      the record, JSON
    pepper:<id>   a pepper, hexadecimal
    version       raised by every change; who polls it knows when to read the rest

The peppers lie beside the digests because every host must be able to check every key. What protects a digest is not
the pepper but the 256 random bits of the key it was made from; keys of the environment are never here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, Literal

from gateway.identity.keyfile import Kept
from gateway.identity.records import KeyRecord, decode, encode
from gateway.store.address import parse
from gateway.store.client import Store, StoreAway, StoreError
from gateway.store.scripts import Script

#: background work: a slow store is waited for
TIMEOUT_S: Final = 1.0

#: KEYS[1] the hash; ARGV: id, record, revision, pepper id, pepper. 0: there is a record as new or newer.
PUT: Final = Script(
    "put_key",
    """
local old = redis.call('HGET', KEYS[1], 'key:' .. ARGV[1])
if old and cjson.decode(old).revision >= tonumber(ARGV[3]) then
  return 0
end
if ARGV[5] ~= '' then
  redis.call('HSETNX', KEYS[1], 'pepper:' .. ARGV[4], ARGV[5])
end
redis.call('HSET', KEYS[1], 'key:' .. ARGV[1], ARGV[2])
return redis.call('HINCRBY', KEYS[1], 'version', 1)
""",
)


class Shared:
    """The hash, and what was seen in it last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = store.key("keys")
        self._version: bytes | None = b""
        self.kept = Kept()

    @property
    def trouble(self) -> str:
        return self._store.trouble

    async def refresh(self) -> bool:
        """Make `kept` what the store holds. False if the store is away. Raises ValueError if a record is damaged."""
        try:
            version = await self._store.call("HGET", self._key, "version", timeout_s=TIMEOUT_S)
            if version == self._version:
                return True
            # read after the version: what changes meanwhile raises it again
            raw = await self._store.call("HGETALL", self._key, timeout_s=TIMEOUT_S)
        except StoreAway:
            return False
        except StoreError as error:
            raise ValueError(f"{self._key} cannot be read: {error}") from error
        self.kept = _read(raw)
        self._version = version
        return True

    async def put(self, record: KeyRecord, pepper: bytes | None) -> Literal["done", "newer", "away"]:
        """Store a record, and the pepper it was made with if that is known.

        "newer": the store has this revision or a later one, made elsewhere; `refresh` shows it.
        """
        args = (record.id, encode(record), record.revision, record.pepper, (pepper or b"").hex())
        try:
            version = await self._store.run(PUT, [self._key], args, timeout_s=TIMEOUT_S)
        except StoreAway:
            return "away"
        except StoreError as error:
            raise ValueError(f"{self._key} cannot be written: {error}") from error
        return "done" if version else "newer"


@asynccontextmanager
async def connected(redis_url: str) -> AsyncIterator[Shared]:
    """The keys in the store at this URL, for a program that asks for nothing else of it."""
    store = Store(parse(redis_url))
    await store.start()
    try:
        yield Shared(store)
    finally:
        await store.close()


def _read(raw: Mapping[bytes, bytes]) -> Kept:
    records, peppers = {}, {}
    for field, value in raw.items():
        kind, _, id = field.decode().partition(":")
        if kind == "key":
            records[id] = decode(value)
        elif kind == "pepper":
            peppers[id] = bytes.fromhex(value.decode())
    return Kept(records, peppers)
