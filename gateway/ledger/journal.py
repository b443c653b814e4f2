"""Journal: the local, append-only account of this process's requests. What is in it survives a kill -9.

Each entry is given to the system with its own write(2), at once, from where the fact happens:

- `open` before the upstream is asked, so whatever an engine worked on is known here;
- `post` before the answer's end is handed over (`Exchange.unsent`), so a client that has all of its answer has its
  record in the journal.

A write costs about a microsecond, less than the bookkeeping of gathering several would. The file is synced to the
disk once a second in a thread: a loss of power can take the last second, the end of this process nothing.

If writing fails (disk full), serving goes on: records wait in memory, bounded, and are written when there is room
again. `failing` says why, `errors` counts, the log says it once a minute.

A journal is a folder `data_dir/journal/<id>` with a lock that its process holds, and numbered segments. Marks of the
requests still open are written again at the head of each new segment, so an old one can be deleted once its records
are elsewhere.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway.ledger import frames
from gateway.ledger.marks import Marks, progress
from gateway.ledger.record import Record, encode

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.ledger.tally import Tallies

_log = logging.getLogger("gateway.ledger")

SEGMENT_BYTES: Final = 8 * 1024 * 1024
#: records that wait in memory for a disk that takes no more
HELD_MAX_BYTES: Final = 64 * 1024 * 1024
PROGRESS_S: Final = 1.0
#: the open requests are looked at in this many slices, so that a thousand streams do not stop the loop at once
SLICES: Final = 10
_SAY_EVERY_S: Final = 60.0

LOCK: Final = "lock"


_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_pack = frames.pack


class Journal:
    """This process's journal below `root`. `start` needs the running loop and raises OSError."""

    def __init__(self, root: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.root = root
        self.id = f"{int(time.time() * 1000):012x}-{os.urandom(4).hex()}"
        self.folder = root / self.id
        self.errors = 0
        self.lost = 0  # records given up because memory for them ran out, too
        self.failing = ""  # why nothing can be written now
        self.tallies: Tallies | None = None  # told of each record that was written, if somebody ships them
        self._segment_bytes = segment_bytes
        self._segment = 0
        self._fd = -1
        self._lock_fd = -1
        self._size = 0
        self._dirty = False
        self._torn = False  # half a frame could not be taken back: go on in another segment
        self._open: dict[str, Exchange] = {}
        self._marked: dict[str, int] = {}  # events of a stream at its last progress mark
        self._round: list[Exchange] = []
        self._slice = 1
        self._turn = 0
        self._held: deque[tuple[Record, bytes]] = deque()
        self._marks = Marks()
        self._held_bytes = 0
        self._said_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._sync: asyncio.Future[Any] | None = None
        self._retired: list[int] = []  # descriptors of full segments, to be synced and closed

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Locked before it has its name: nobody may take it for the journal of a process that is gone.
        fresh = self.root / f".new-{self.id}"
        fresh.mkdir(mode=0o700)
        self._lock_fd = os.open(fresh / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(self.folder)
        self._next_segment()
        self._timer = asyncio.get_running_loop().call_later(PROGRESS_S / SLICES, self._tick)

    async def close(self) -> None:
        """Write what waits, sync, and give up the lock. Requests that are still open stay open in it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sync is not None:
            await asyncio.wait([self._sync])
        if self._fd < 0:
            return
        self._retry()
        if not self._open and not self._held:
            self._write(frames.CLOSE_FRAME)
        fd, self._fd = self._fd, -1
        try:
            await asyncio.to_thread(_sync, None, [*self._retired, fd])
        except OSError as error:
            self._failed(error)
        os.close(self._lock_fd)

    # -- what happens -------------------------------------------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """The exchange is about to reach an upstream. Again for another upstream: the last word holds."""
        self._open[exchange.id] = exchange
        if self._fd >= 0 and not self.failing:
            self._write(_pack(frames.OPEN, self._marks.opened(exchange)))

    def post(self, record: Record, payload: bytes = b"") -> None:
        """The record of a finished request, opened here or not; `payload`: the record encoded, where that was done."""
        self._open.pop(record.request_id, None)
        if self._marked:
            self._marked.pop(record.request_id, None)
        payload = payload or encode(record)
        if self.failing or not self._post(record, payload):
            self._hold(record, payload)

    def _post(self, record: Record, payload: bytes) -> bool:
        if not self._write(_pack(frames.FINAL, payload)):
            return False
        if self.tallies is not None:
            self.tallies.post(record, payload, self._segment << 32 | self._size)
        return True

    @property
    def position(self) -> int:
        """Behind the last entry."""
        return frames.position(self._segment, self._size)

    @property
    def held(self) -> int:
        """Records that wait in memory."""
        return len(self._held)

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> bool:
        if self._size >= self._segment_bytes:
            self._rotate()
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._failed(error)
            return False
        if written < len(data):  # no room for the rest: what is there would be half a frame
            self._take_back()
            self._failed(OSError(f"only {written} of {len(data)} bytes could be written"))
            return False
        self._size += written
        self._dirty = True
        return True

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._torn = True  # readers skip to the next whole frame, and report what they skipped

    def _hold(self, record: Record, payload: bytes) -> None:
        if self._held_bytes + len(payload) > HELD_MAX_BYTES:
            self.lost += 1
            return
        self._held.append((record, payload))
        self._held_bytes += len(payload)

    def _failed(self, error: OSError) -> None:
        self.errors += 1
        self.failing = error.strerror or str(error)
        now = time.monotonic()
        if now - self._said_at >= _SAY_EVERY_S or not self._said_at:
            self._said_at = now
            _log.error(
                "the journal in %s cannot be written: %s; records wait in memory (%d so far, %d lost)",
                self.folder, self.failing, len(self._held), self.lost,
            )  # fmt: skip

    def _retry(self) -> None:
        """Write what waits, as far as that goes, then the marks that could not be made."""
        if not self.failing:
            return
        if self._torn:
            try:
                self._next_segment()
            except OSError as error:
                self._failed(error)
                return
        while self._held:
            if not self._post(*self._held[0]):
                return
            self._held_bytes -= len(self._held.popleft()[1])
        marks = self._open_marks()
        if not self._write(marks or b""):
            return
        self.failing = ""
        _log.warning("the journal in %s can be written again; %d records were lost", self.folder, self.lost)

    def _rotate(self) -> None:
        try:
            self._next_segment()
        except OSError as error:  # go on in the old one, and try again with the next entry
            self.errors += 1
            _log.debug("no new segment: %s", error)

    def _next_segment(self) -> None:
        """Go on in a new segment, which begins with marks of all requests that are open now."""
        number = self._segment + 1
        path = frames.segment_path(self.folder, number)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        marks = self._open_marks()
        try:
            if os.write(fd, marks) < len(marks):
                raise OSError("no room for a new segment")
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        old, self._fd = self._fd, fd
        self._segment, self._size, self._torn, self._dirty = number, len(marks), False, True
        if old >= 0:
            self._retired.append(old)

    def _open_marks(self) -> bytes:
        parts = []
        for exchange in self._open.values():
            parts.append(_pack(frames.OPEN, self._marks.opened(exchange)))
            if exchange.id in self._marked:
                parts.append(_pack(frames.PROGRESS, progress(exchange)))
        return b"".join(parts)

    # -- every tenth of a second ----------------------------------------------------------------------------------

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PROGRESS_S / SLICES, self._tick)
        self._turn = (self._turn + 1) % SLICES
        if self._turn == 0:
            self._round = list(self._open.values())
            self._slice = len(self._round) // SLICES + 1
            self._retry()
            if self._dirty and not self.failing and (self._sync is None or self._sync.done()):
                self._dirty = False
                retired, self._retired = self._retired, []
                self._sync = loop.run_in_executor(None, _sync, self._fd, retired)
                self._sync.add_done_callback(self._synced)
        if self._round and not self.failing:
            self._mark_progress()

    def _mark_progress(self) -> None:
        some = self._round[-self._slice :]
        del self._round[-self._slice :]
        marks = []
        for exchange in some:
            meter = exchange.meter
            if meter is None or not exchange.stream or exchange.id not in self._open:
                continue
            if self._marked.get(exchange.id) != meter.events:
                self._marked[exchange.id] = meter.events
                marks.append(_pack(frames.PROGRESS, progress(exchange)))
        if marks:
            self._write(b"".join(marks))

    def _synced(self, sync: asyncio.Future[Any]) -> None:
        if not sync.cancelled() and (error := sync.exception()) is not None:
            self.errors += 1
            _log.error("the journal in %s could not be synced to the disk: %s", self.folder, error)


def _sync(fd: int | None, retired: list[int]) -> None:
    """Sync `retired` segments and close them, then sync `fd`. The retired are nobody else's by now."""
    try:
        for old in retired:
            _fdatasync(old)
        if fd is not None:
            _fdatasync(fd)
    finally:
        for old in retired:
            os.close(old)
