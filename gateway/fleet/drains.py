"""Drains: upstreams that get no new request because an operator said so. What runs on them ends.

A drain holds for an upstream's identity, so it outlives reloads, and also an upstream that goes away and comes back.
With a store it is kept there: it outlives restarts, and every gateway that shares the store follows within
LOOK_EVERY_S. While the store is away, and without one, it holds in this process. Each word about an upstream has a
revision; of two the later one holds, so that gateways that were apart agree again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.store.client import StoreAway, StoreError
from gateway.store.scripts import Script

if TYPE_CHECKING:
    from gateway.catalog import Catalog
    from gateway.store.client import Store

_log = logging.getLogger("gateway.fleet")

LOOK_EVERY_S: Final = 1.0
#: background work: a slow store is waited for
TIMEOUT_S: Final = 1.0
#: an upstream that was resumed so long ago need not be spoken of any more
FORGET_S: Final = 7 * 86400.0

#: KEYS[1] the hash; ARGV: identity, word, revision. 0: there is a word as new or newer.
PUT: Final = Script(
    "put_drain",
    """
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old and cjson.decode(old).revision >= tonumber(ARGV[3]) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
""",
)


class Word(msgspec.Struct, frozen=True):
    """What was said last about an upstream: whether it is drained, when (Unix time) and by whom."""

    draining: bool
    at: float
    by: str
    revision: int


_decode: Final = msgspec.json.Decoder(Word).decode
_encode: Final = msgspec.json.Encoder().encode


class Drains:
    """All words, applied to `catalog` whenever they change."""

    def __init__(self, catalog: Catalog, store: Store | None, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._key = store.key("drains") if store is not None else ""
        self._words: dict[str, Word] = {}
        #: identities whose word the store does not have yet
        self._untold: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn what holds before the first request is taken. Needs the running loop, and the store started."""
        if self._store is not None:
            await self.sync()
            self._task = asyncio.create_task(self._run(), name="drains")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def word(self, identity: str) -> Word | None:
        """What was said last about that upstream."""
        return self._words.get(identity)

    async def say(self, identity: str, draining: bool, by: str) -> None:
        """Drain an upstream, or take it into service again. It holds here at once, and for the others soon."""
        before = self._words.get(identity)
        if (before is not None and before.draining) is draining:
            return  # so a revision's word is one and the same everywhere: they take turns
        revision = 1 if before is None else before.revision + 1
        self._adopt({identity: Word(draining, self._clock(), by, revision)})
        if self._store is not None:
            self._untold.add(identity)
            await self.sync()

    async def sync(self) -> None:
        """Tell the store what it does not know, and learn what it does."""
        store = self._store
        assert store is not None
        try:
            for identity in list(self._untold):
                word = self._words[identity]
                await store.run(PUT, [self._key], (identity, _encode(word), word.revision), timeout_s=TIMEOUT_S)
                self._untold.discard(identity)
            raw: dict[bytes, bytes] = await store.call("HGETALL", self._key, timeout_s=TIMEOUT_S)
            words = {identity.decode(): _decode(text) for identity, text in raw.items()}
            old = [one for one, word in words.items() if not word.draining and word.at < self._clock() - FORGET_S]
            if old:
                await store.call("HDEL", self._key, *old, timeout_s=TIMEOUT_S)
                words = {identity: word for identity, word in words.items() if identity not in old}
        except StoreAway:
            return
        except (StoreError, ValueError, msgspec.MsgspecError) as error:
            _log.error("%s cannot be used: %s", self._key, type(error).__name__)
            return
        self._forget(words)
        self._adopt(
            {
                identity: word
                for identity, word in words.items()
                if identity not in self._words or word.revision > self._words[identity].revision
            }
        )

    def _forget(self, words: dict[str, Word]) -> None:
        """Where the store has no word (or an older one) any more: it is told again, or nobody speaks of it any more."""
        for identity, word in list(self._words.items()):
            if identity in words and words[identity].revision >= word.revision:
                continue
            if word.draining or word.at >= self._clock() - FORGET_S:
                self._untold.add(identity)
            else:  # revisions begin anew
                del self._words[identity]

    def _adopt(self, words: dict[str, Word]) -> None:
        if not words:
            return
        drained = {identity for identity, word in self._words.items() if word.draining}
        self._words |= words
        self._catalog.drain(identity for identity, word in self._words.items() if word.draining)
        for identity, word in words.items():
            if not word.draining and identity not in drained:
                continue  # an old word, heard at the start: nothing is different
            _log.info("upstream %s is %s by %s", identity, "drained" if word.draining else "in service again", word.by)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.sync()
            except Exception as error:
                _log.error("following drains failed: %s", type(error).__name__)
