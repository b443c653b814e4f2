"""Shipper: moves records from journals into the store, each exactly once.

A batch and the position it ends at are one script: the sums, the raw records and the journal's mark change together or
not at all, and only if the mark is where the batch begins. So whatever is sent again after a doubt (an answer that did
not come, a process that died) is refused by the store, which says where to go on.

A segment is deleted when everything in it has been in the store for `GRACE_S`, the mark is still there, and the store,
where it can (WAITAOF), says that the mark is on its disk: the mark is written once more for that, and what is synced
with a write is synced with all before it. One that forgot its last seconds, or whose replica took over without them,
gets them again.

This process's own records are added up as they are posted (`tally`), and shipped as sums for the part of the journal
that they stand for; the journal is read for what no tally has: what others left behind, and what a store forgot or was
away for too long to be kept in memory.

While the store is away everything waits on disk. Without a store what dead processes left behind is ended, the journals
are the ledger, and the oldest beyond `keep_bytes` is folded into sums (`folded`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from gateway.ledger import folded, frames
from gateway.ledger.recovery import GATEWAY_ENDED, Adopted, adopt, decode, entries
from gateway.ledger.tally import Tallies
from gateway.ledger.totals import DAY_S, SUMS, Place, Sums, Totals, of
from gateway.store.client import StoreAway
from gateway.store.scripts import Script

if TYPE_CHECKING:
    from gateway.ledger.journal import Journal
    from gateway.ledger.record import Record
    from gateway.store.client import Store

_log = logging.getLogger("gateway.ledger")

BATCH: Final = 250
SHIP_EVERY_S: Final = 0.25
ADOPT_EVERY_S: Final = 10.0
GRACE_S: Final = 5.0
CALL_S: Final = 5.0
#: a store that syncs each second is done by then
SYNC_S: Final = 2.0
#: the store did not sync so many times in a row: it never does (appendfsync no), and its operator knows
UNSYNCED_MAX: Final = 10
#: of records one by one, without a store: a few hundred thousand
KEEP_BYTES: Final = 256 * 1024 * 1024
STREAM_MAX: Final = 100_000  # raw records kept
READ_BYTES: Final = 1024 * 1024  # of raw records that are asked for at once, about
HOURS_KEPT_S: Final = 100 * DAY_S
SEPARATOR: Final = "\x1f"

#: KEYS: marks, stream, number of records in the stream, hours, days. ARGV: journal, mark expected, mark after, records
#: kept in the stream, seconds hours are kept, number of hours, number of raw records, these as one text, then (index of
#: key, field, amount) for each sum. The stream has an entry for a call: n, and z, one a line, deflated.
SHIP: Final = Script(
    "ship",
    """
local mark = redis.call('HGET', KEYS[1], ARGV[1]) or '0'
if mark ~= ARGV[2] then return mark end
for at = 9, #ARGV, 3 do
  -- An error would end the script with half of the sums counted and the mark behind them: they would be counted again.
  local done = redis.pcall('HINCRBY', KEYS[tonumber(ARGV[at])], ARGV[at + 1], ARGV[at + 2])
  if type(done) == 'table' and not (string.find(done.err, 'overflow') or string.find(done.err, 'range')) then
    return done
  end
end
for i = 4, 3 + tonumber(ARGV[6]) do redis.call('EXPIRE', KEYS[i], ARGV[5]) end
if ARGV[7] ~= '0' then
  local kept = tonumber(redis.call('GET', KEYS[3]) or redis.call('XLEN', KEYS[2])) + tonumber(ARGV[7])
  redis.call('XADD', KEYS[2], '*', 'n', ARGV[7], 'z', ARGV[8])
  while kept > tonumber(ARGV[4]) do
    local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
    if not oldest then kept = 0 break end
    local count = tonumber(oldest[2][2])
    if kept - count < tonumber(ARGV[4]) then break end
    redis.call('XDEL', KEYS[2], oldest[1])
    kept = kept - count
  end
  redis.call('SET', KEYS[3], kept)
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return ARGV[3]
""",
)


#: KEYS: marks. ARGV: journal, mark expected. Writes the mark again if it is there.
CONFIRM: Final = Script(
    "confirm",
    """
local mark = redis.call('HGET', KEYS[1], ARGV[1]) or '0'
if mark == ARGV[2] then redis.call('HSET', KEYS[1], ARGV[1], mark) end
return mark
""",
)


class Batch(NamedTuple):
    """Records read from a journal; `end` is the position behind the last, `read` that up to which there is no other."""

    payloads: list[bytes]
    records: list[Record]
    end: int
    read: int


def marks_key(store: Store) -> str:
    return store.key("usage", "marks")


def records_key(store: Store) -> str:
    return store.key("usage", "records")


def kept_key(store: Store) -> str:
    return store.key("usage", "kept")


def hour_key(store: Store, at: int) -> str:
    return store.key("usage", "hour", str(at))


def day_key(store: Store, at: int) -> str:
    return store.key("usage", "day", str(at))


def field_of(place: Place, name: str) -> str:
    return SEPARATOR.join((place.key, place.group, place.model, place.provider, place.upstream, name))


class _Source:
    """A journal on its way into the store. `read`: nothing before it is left to ship."""

    def __init__(self, folder: Path, adopted: Adopted | None = None) -> None:
        self.folder = folder
        self.adopted = adopted
        self.mark = -1  # the store's; -1: to be asked
        self.read = 0
        self.first = 1  # the oldest segment that may still be there
        self.passed: tuple[int, float] = (0, 0.0)  # a position that was shipped, and since when (monotonic)


class Shipper:
    """Ships this process's journal, and those of processes that are gone. `start` needs the running loop."""

    def __init__(
        self, journal: Journal, store: Store | None, *, grace_s: float = GRACE_S, keep_bytes: int = KEEP_BYTES
    ) -> None:
        self._journal = journal
        self._store = store
        self._grace_s = grace_s
        self.keep_bytes = keep_bytes
        self._own = _Source(journal.folder)
        if store is not None:
            journal.tallies = Tallies(journal.position)
        self._adopted: list[_Source] = []
        self._adopt_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._unsynced = 0  # times in a row that the store did not sync in time
        self.shipped = 0  # records

    def start(self) -> None:
        if self._store is None:
            (self._journal.folder / folded.ALONE).touch()
        self._task = asyncio.create_task(self._run(), name="ledger shipper")

    async def stop(self) -> None:
        """Ship what is left, if the store is there. Call it when the journal is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if self._store is not None and self._store.up:
                await self._ship_quietly(self._own)
        for source in self._adopted:
            assert source.adopted is not None
            source.adopted.release()
        self._adopted.clear()

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except StoreAway as error:
                _log.info("records wait in the journal: %s", error)
            except Exception as error:  # the next round begins anew; nothing is deleted that was not shipped
                _log.error("the ledger could not be shipped: %s: %s", type(error).__name__, error)
                await asyncio.sleep(1.0)
            await asyncio.sleep(SHIP_EVERY_S)

    async def _round(self) -> None:
        now = monotonic()
        if now >= self._adopt_at:
            self._adopt_at = now + ADOPT_EVERY_S
            await _whole(self._adopt)
            if self._store is None:
                await _whole(self._fold)
        if self._store is None or not self._store.up:
            return
        if self._own.mark < 0 or self._journal.position != self._own.read:
            await self._ship(self._own)
        await self._truncate(self._own)
        for source in list(self._adopted):
            assert source.adopted is not None
            try:
                await self._ship(source)
                if await self._remove(source):
                    self._adopted.remove(source)
            except OSError as error:  # the others must not wait until its files can be read
                _log.error("the journal %s cannot be shipped now: %s", source.folder.name, error)
                source.adopted.release()  # and is adopted again
                self._adopted.remove(source)

    def _adopt(self) -> None:
        """Take over the journals that nobody writes any more."""
        for adopted in adopt(self._journal.root):
            try:
                folded.trim(self._journal.root, adopted.folder)
                adopted.finish()
            except (OSError, ValueError) as error:
                _log.error("the journal %s cannot be recovered now: %s", adopted.folder.name, error)
                adopted.release()
            else:
                self._adopted.append(_Source(adopted.folder, adopted))

    def _fold(self) -> None:
        """Fold the oldest segments that this process may, until all journals together are small enough."""
        root = self._journal.root
        over_bytes = folded.size_bytes(root) - self.keep_bytes
        if over_bytes <= 0:
            return
        writing = frames.segment_of(self._journal.position)
        chosen: list[tuple[Path, int]] = []
        ended: list[_Source] = []
        for source in (*self._adopted, self._own):  # those of the dead are the older ones
            if not (source.folder / folded.ALONE).exists():
                continue
            for number, path in frames.segments(source.folder):
                if over_bytes <= 0 or (source.adopted is None and number >= writing):
                    break
                chosen.append((source.folder, number))
                over_bytes -= path.stat().st_size
            else:
                if source.adopted is not None:
                    ended.append(source)
        if not chosen:
            return
        count = folded.fold(root, chosen, int(time()) - HOURS_KEPT_S)
        for source in ended:
            assert source.adopted is not None
            source.adopted.remove()
            self._adopted.remove(source)
        _log.info("%d records of %d journal segments were summed up by hour and are no longer kept", count, len(chosen))

    async def _ship_quietly(self, source: _Source) -> None:
        with contextlib.suppress(StoreAway, OSError):  # it is on disk: the next start ships it
            await self._ship(source)

    async def _ship(self, source: _Source) -> None:
        """Everything the journal holds now; what is posted meanwhile waits for the next round, and is more by then."""
        store = self._store
        tallies = self._journal.tallies
        assert store is not None
        assert tallies is not None
        own = source is self._own
        goal = tallies.end
        sent = False
        while True:
            if source.mark < 0:
                mark = await store.call("HGET", marks_key(store), source.folder.name, timeout_s=CALL_S)
                self._stands_at(source, int(mark or 0))
            if own and source.read >= tallies.start:
                if sent and source.read >= goal:
                    return
                tally = tallies.first()
                if tally is None:
                    source.read = self._journal.position  # what follows the last record are marks
                    tallies.restart(source.read)
                    return
                if await self._send(source, tally.totals, tally.count, tally.deflated, tally.end):
                    tallies.shipped(tally)
                    source.read = tally.end
                    sent = True
                continue
            until = tallies.start if own else None
            batch = await asyncio.to_thread(read_batch, source.folder, source.read, until=until)
            if not batch.payloads:
                source.read = batch.read if until is None else until
                if until is None:
                    return
                continue
            if source.adopted is not None:
                batch = await self._unknown(batch)
            deflated = zlib.compress(b"\n".join(batch.payloads), 1)
            if await self._send(source, of(batch.records), len(batch.payloads), deflated, batch.end):
                source.read = batch.read

    async def _send(self, source: _Source, totals: Totals, count: int, deflated: bytes, end: int) -> bool:
        """Move the mark to `end` with what lies before it; False if it is not where we thought, and so nothing was."""
        assert self._store is not None
        keys, args = shipment(self._store, source.folder.name, source.mark, end, totals, count, deflated)
        try:
            mark = int(await self._store.run(SHIP, keys, args, timeout_s=CALL_S))
        except StoreAway:
            source.mark = -1  # it may have run
            raise
        if mark != end:
            self._stands_at(source, mark)
            return False
        self.shipped += count
        source.mark = mark
        return True

    def _stands_at(self, source: _Source, mark: int) -> None:
        """The store has the journal up to `mark`."""
        source.mark = source.read = mark
        if source is self._own and self._journal.tallies is not None:
            self._journal.tallies.align(mark, self._journal.position)

    async def _unknown(self, batch: Batch) -> Batch:
        """The batch without recovered records whose request has one in the store already: its own was shipped before
        the file that held it was damaged.
        """
        recovered = {one.request_id for one in batch.records if one.error == GATEWAY_ENDED}
        if not recovered:
            return batch
        assert self._store is not None
        known = set()
        async for _, payload in newest(self._store):
            record = decode(payload)
            if record.request_id in recovered:
                known.add(record.request_id)
        kept = [pair for pair in zip(batch.payloads, batch.records, strict=True) if pair[1].request_id not in known]
        return Batch([one for one, _ in kept], [one for _, one in kept], batch.end, batch.read)

    async def _settled(self, source: _Source) -> bool:
        """Whether what was shipped at `passed` has been in the store for the grace time, and still is."""
        now = monotonic()
        place, since = source.passed
        if not since or source.read < place:
            source.passed = (source.read, now)
            return False
        if now - since < self._grace_s:
            return False
        assert self._store is not None
        mark, synced = await self._store.run_synced(
            CONFIRM, [marks_key(self._store)], [source.folder.name, source.mark], sync_s=SYNC_S, timeout_s=CALL_S
        )
        if int(mark) != source.mark:
            _log.warning("the store has forgotten records; they are shipped again from the journal")
            source.mark = -1
            source.passed = (0, 0.0)
            return False
        if synced is False and self._unsynced < UNSYNCED_MAX:
            self._unsynced += 1
            if self._unsynced == UNSYNCED_MAX:
                _log.warning("the store does not sync its append-only file: what it forgets when its host dies is lost")
            source.passed = (place, now)
            return False
        if synced:
            self._unsynced = 0
        return True

    async def _truncate(self, source: _Source) -> None:
        """Delete the segments before the one that is read now."""
        place = source.passed[0]
        if frames.segment_of(source.read) <= source.first:
            return
        if not await self._settled(source):
            return
        source.passed = (0, 0.0)
        source.first = frames.segment_of(place)
        for number, path in await asyncio.to_thread(frames.segments, source.folder):
            if number < source.first:
                path.unlink()

    async def _remove(self, source: _Source) -> bool:
        if not await self._settled(source):
            return False
        assert source.adopted is not None
        assert self._store is not None
        await _whole(source.adopted.remove)
        await self._store.call("HDEL", marks_key(self._store), source.folder.name, timeout_s=CALL_S)
        return True


async def _whole(do: Callable[[], None]) -> None:
    """Run `do` in a thread, to its end also when we are cancelled: a lock that it takes must come to us, to be given
    back, and none be given back under it.
    """
    running = asyncio.ensure_future(asyncio.to_thread(do))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def read_batch(folder: Path, after: int, limit: int = BATCH, *, until: int | None = None) -> Batch:
    """The next records of a journal; those that end behind `until` are left."""
    payloads: list[bytes] = []
    records: list[Record] = []
    end = read = after
    for entry in entries(folder, after):
        if until is not None and entry.position > until:
            break
        read = entry.position
        if entry.kind != frames.FINAL:
            continue
        end = read
        try:
            record = decode(entry.payload)
        except msgspec.DecodeError as error:  # one that cannot be read must not hold up all that follow
            _log.error("a record in %s cannot be understood and is left out: %s", folder.name, error)
            continue
        payloads.append(entry.payload)
        records.append(record)
        if len(payloads) == limit:
            break
    return Batch(payloads, records, end, read)


def shipment(
    store: Store, journal: str, mark: int, end: int, hours: Totals, count: int, deflated: bytes
) -> tuple[list[str], list[str | bytes | int]]:
    """Keys and arguments of SHIP. `deflated`: `count` records, one a line; much the same again and again, they become a
    twentieth in less time than the store would take to copy the rest.
    """
    keys = [marks_key(store), records_key(store), kept_key(store)]
    first = len(keys)
    indexes: dict[str, int] = {}
    for at in sorted({place.at for place in hours}):
        indexes.setdefault(hour_key(store, at), first + len(indexes) + 1)
    hours_count = len(indexes)
    for at in sorted({place.at // DAY_S * DAY_S for place in hours}):
        indexes.setdefault(day_key(store, at), first + len(indexes) + 1)
    increments: list[str | bytes | int] = []
    for place, sums in hours.items():
        hour = indexes[hour_key(store, place.at)]
        day = indexes[day_key(store, place.at // DAY_S * DAY_S)]
        labels = field_of(place, "")
        for name, amount in sums.items():
            if amount:
                field = labels + name
                increments += (hour, field, amount, day, field, amount)
    head: list[str | bytes | int] = [journal, mark, end, STREAM_MAX, HOURS_KEPT_S, hours_count, count]
    return [*keys, *indexes], [*head, deflated, *increments]


def sums_of(at: int, fields: Sequence[bytes]) -> dict[Place, Sums]:
    """A hash of sums, as HGETALL gives it flat, understood."""
    found: dict[Place, Sums] = {}
    for field, amount in zip(fields[::2], fields[1::2], strict=True):
        *labels, name = field.decode().split(SEPARATOR)
        if name in SUMS and len(labels) == 5:
            found.setdefault(Place(at, *labels), {})[name] = int(amount)
    return found


async def newest(store: Store) -> AsyncIterator[tuple[bytes, bytes]]:
    """(id, record as JSON) of the raw records in the store, newest first. Records shipped together share an id."""
    last = "+"
    chunk = 16
    while True:
        found = await store.call("XREVRANGE", records_key(store), last, "-", "COUNT", chunk, timeout_s=CALL_S)
        size = 1
        for name, fields in found:
            payloads = zlib.decompress(fields[b"z"])
            size += len(payloads)
            for payload in reversed(payloads.split(b"\n")):
                yield name, payload
        if len(found) < chunk:
            return
        last = "(" + found[-1][0].decode()
        # An entry holds one record or a thousand.
        chunk = max(4, min(1000, chunk * READ_BYTES // size))
