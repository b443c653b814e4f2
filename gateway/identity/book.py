"""Keys as operators change them, and as every process comes to know of it.

The records live in the data directory, whose processes all see one file. Where several hosts share a store by
REDIS_URL they live in the store, and the file is each host's copy: keys stay valid while the store is away, and what
was changed meanwhile is brought to it when it is back. (The gateway's own embedded store is not used for keys: who
can reach it has the same data directory.)

Every process looks for changes each second: one `stat` of the file, one small read of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import BadRequest, GatewayError, NotFound
from gateway.identity.fields import refused
from gateway.identity.keyfile import Kept, KeyFileError
from gateway.identity.keys import KeyRing
from gateway.identity.records import KeyRecord, Previous, Records, configured_document, document, later

if TYPE_CHECKING:
    from gateway.identity.shared import Shared

_log = logging.getLogger("gateway.keys")

EVERY_S: Final = 1.0
#: rounds of an edit that others' edits keep overtaking
_TRIES: Final = 10
#: texts of one key that are accepted at the same time
_TEXTS_MAX: Final = 4


class KeyBook:
    """Changes keys, and follows the changes of others. `shared` is None where no store is shared.

    What changes a key raises NotFound for an unknown id, BadRequest (400 or 409) for what cannot be done,
    KeyFileError or OSError if the data directory cannot be written.
    """

    def __init__(
        self,
        ring: KeyRing,
        shared: Shared | None = None,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ring = ring
        self.shared = shared
        self.clock = clock
        self._every_s = every_s
        self._lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""
        self._agreed: Records | None = None  # the ring's records when they were last those of the store

    # -- changes ------------------------------------------------------------------------------------------------

    def find(self, id: str) -> KeyRecord:
        """The record with this id. Raises NotFound."""
        return _known(self.ring.records, id)

    def rows(self) -> list[dict[str, Any]]:
        """Every key as an operator is shown it, oldest first, then those of the environment."""
        now = self.clock()
        records = sorted(self.ring.records.values(), key=lambda record: (record.created_at, record.name))
        return [document(record, now) for record in records] + [
            configured_document(one) for one in self.ring.configured.values()
        ]

    async def create(self, fields: dict[str, Any]) -> tuple[str, KeyRecord]:
        """A new key with these fields of KeyRecord; its text is given here and kept nowhere."""
        key, made = self.ring.make_key(**fields)

        def add(records: Records) -> KeyRecord:
            self._refuse_taken(records, made.name, made.id)
            return made

        return key, await self._change(add)

    async def edit(self, id: str, fields: dict[str, Any]) -> KeyRecord:
        """Replace fields of a key."""

        def set_fields(records: Records) -> KeyRecord:
            record = _live(records, id)
            if "name" in fields:
                self._refuse_taken(records, fields["name"], id)
            return replace(record, **fields, revision=record.revision + 1)

        return await self._change(set_fields)

    async def rotate(self, id: str, overlap_s: float) -> tuple[str, KeyRecord]:
        """Give the key another text; the one before is accepted for `overlap_s` more. Id, limits and usage stay."""
        texts: list[str] = []

        def turn(records: Records) -> KeyRecord:
            record = _live(records, id)
            now = self.clock()
            if self.ring.pepper_of(record) is None:
                raise _conflict(f"the key {id} cannot be rotated here: the pepper it was made with is not known")
            text, digest = self.ring.new_text(record)
            texts.append(text)
            before = (Previous(record.digest, now + overlap_s), *record.previous)
            accepted = tuple(old for old in before if old.valid_until > now)[: _TEXTS_MAX - 1]
            return replace(record, digest=digest, previous=accepted, revision=record.revision + 1)

        record = await self._change(turn)
        return texts[-1], record

    async def revoke(self, id: str) -> KeyRecord:
        """End a key for good. One that was revoked stays as it is."""
        if self.find(id).revoked_at is not None:
            return self.find(id)

        def end(records: Records) -> KeyRecord:
            record = _known(records, id)
            at = self.clock() if record.revoked_at is None else record.revoked_at
            return replace(record, revoked_at=at, previous=(), revision=record.revision + 1)

        return await self._change(end)

    async def _change(self, make: Callable[[Records], KeyRecord]) -> KeyRecord:
        """Store what `make` makes of the present records, first where all hosts see it."""
        async with self._lock:
            for _ in range(_TRIES):
                await self._sync()
                if self.shared is None:
                    break
                record = make(self.ring.records)
                outcome = await self.shared.put(record, self.ring.pepper_of(record))
                if outcome == "away":
                    break
                if outcome == "done":
                    await self._copy(record)
                    return record
            else:
                raise _conflict("others keep changing this key: try again")
            return await self._store(make)

    async def _copy(self, record: KeyRecord) -> None:
        """Keep here what the store has. Its text is not lost with a full disk: the store is where it counts."""
        try:
            await self._store(lambda _: record)
        except (KeyFileError, OSError) as error:
            self.ring.adopt(Kept({record.id: record}), self.ring.mark)
            _log.error("the key %s is in the store, and not in the data directory: %s", record.id, error)

    async def _store(self, make: Callable[[Records], KeyRecord]) -> KeyRecord:
        made: list[KeyRecord] = []

        def edit(records: Records) -> list[KeyRecord]:
            made.append(make(records))
            return made

        # In a thread: the lock may be held by another process, and the disk may be slow.
        kept, mark = await asyncio.to_thread(self.ring.store, edit)
        self.ring.adopt(kept, mark)
        return made[0]

    def _refuse_taken(self, records: Records, name: str, id: str) -> None:
        taken = any(one.name == name and one.id != id and one.revoked_at is None for one in records.values())
        if taken or any(one.name == name for one in self.ring.configured.values()):
            raise refused("name", f"{name!r} is the name of another key")

    # -- following ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Look once, then each second until `stop`."""
        await self.sync()
        self._task = asyncio.create_task(self._follow(), name="follow keys")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None

    def wake(self) -> None:
        """Look now."""
        self._woken.set()

    async def sync(self) -> None:
        """Take in what others changed, and bring to the store what it lacks. Trouble is logged; keys stay valid."""
        async with self._lock:
            await self._sync()

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._woken.wait()
            self._woken.clear()
            try:
                await self.sync()
            except Exception as error:  # a fault here must not end the following: a revoked key would stay valid
                if self._trouble != repr(error):
                    where = "".join(traceback.format_tb(error.__traceback__))
                    _log.error("keys may be out of date: %s\n%s", type(error).__name__, where)
                self._trouble = repr(error)

    async def _sync(self) -> None:
        trouble = ""
        try:
            mark = self.ring.file.mark()
            if mark is not None and mark != self.ring.mark:
                self.ring.adopt(await asyncio.to_thread(self.ring.file.read), mark)
            if self.shared is not None:
                await self._share(self.shared)
        except (KeyFileError, ValueError) as error:
            trouble = str(error)
        except OSError as error:
            trouble = f"{error.strerror}: {error.filename or self.ring.file.data_dir}"
        if trouble and trouble != self._trouble:
            _log.error("keys may be out of date: %s", trouble)
        self._trouble = trouble

    async def _share(self, shared: Shared) -> None:
        seen, before = shared.kept, self.ring.records
        if not await shared.refresh() or (shared.kept is seen and before is self._agreed):
            return
        theirs = shared.kept.records
        self.ring.adopt(shared.kept, self.ring.mark)
        for mine in self.ring.records.values():
            known = theirs.get(mine.id)
            if known is not None:
                if known == mine or later(known, mine) is known:
                    continue
                if known.revision == mine.revision:  # changed on two hosts while the store was away
                    mine = replace(mine, revision=known.revision + 1)
            if await shared.put(mine, self.ring.pepper_of(mine)) != "done":
                return  # the next look sees more
        if self.ring.records is not before:  # kept here too, for the time the store is away
            await self._keep()
        self._agreed = self.ring.records

    async def _keep(self) -> None:
        kept, mark = await asyncio.to_thread(self.ring.store, _nothing)
        self.ring.adopt(kept, mark)


def _nothing(records: Records) -> list[KeyRecord]:
    return []


def _known(records: Records, id: str) -> KeyRecord:
    try:
        return records[id]
    except KeyError:
        raise NotFound("there is no key with this id", code="key_not_found") from None


def _live(records: Records, id: str) -> KeyRecord:
    record = _known(records, id)
    if record.revoked_at is not None:
        raise _conflict(f"the key {id} is revoked, and stays so: create another")
    return record


def _conflict(message: str) -> GatewayError:
    return BadRequest(message, code="key_conflict", status=409)
