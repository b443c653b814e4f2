"""What journals hold: reading them, and ending those whose process is gone.

`adopt` takes the lock of each journal that nobody holds any more, and gives every request in it that never ended a
record of its own: outcome "partial", `estimated`, with the tokens of its last progress mark. Those records are
written behind the journal, so that it is then like any other: read or shipped, and recovered never again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from gateway.ledger import frames
from gateway.ledger.journal import LOCK
from gateway.ledger.marks import Opened, Progress
from gateway.ledger.prices import cost
from gateway.ledger.record import Record, encode
from gateway.wire.usage import Usage

_log = logging.getLogger("gateway.ledger")

#: `error` of a record that was made here
GATEWAY_ENDED: Final = "gateway_ended"
_BYTES_PER_TOKEN: Final = 4

_decode_record = msgspec.json.Decoder(Record).decode
_decode_opened = msgspec.json.Decoder(Opened).decode
_decode_progress = msgspec.json.Decoder(Progress).decode


class Entry(NamedTuple):
    """A frame and its position in the journal."""

    position: int
    kind: int
    payload: bytes


@dataclass(slots=True)
class Damaged:
    """What could not be read: whole bytes skipped, and where. The cut end of the newest segment is no damage."""

    places: list[str] = field(default_factory=list)
    skipped_bytes: int = 0


def entries(folder: Path, after: int = 0, damaged: Damaged | None = None) -> Iterator[Entry]:
    """The entries of a journal behind the position `after`, oldest first. Safe beside its writer: a segment that is
    gone was shipped, and a frame that is only half there is not there yet.
    """
    found = frames.segments(folder)
    for number, path in found:
        if number < frames.segment_of(after):
            continue
        start = frames.offset_of(after) if number == frames.segment_of(after) else 0
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            continue
        for part in frames.unpack(data):
            if isinstance(part, frames.Damage):
                newest = number == found[-1][0]
                if damaged is not None and not (part.tail and newest):
                    damaged.places.append(f"{path.name} at byte {start + part.at}: {part.length} bytes")
                    damaged.skipped_bytes += part.length
                continue
            yield Entry(frames.position(number, start + part.end), part.kind, part.payload)


def decode(payload: bytes) -> Record:
    """A FINAL entry's record. Raises msgspec.DecodeError."""
    return _decode_record(payload)


def journals(root: Path) -> list[Path]:
    """The folders of all journals below `root`, oldest first."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except FileNotFoundError:
        return []


def recover(folder: Path, damaged: Damaged | None = None) -> Iterator[Record]:
    """Exactly one record for each request that `folder`'s journal knows: its own, else one made from its marks."""
    unended: dict[str, Opened] = {}
    progress: dict[str, Progress] = {}
    ended: set[str] = set()
    for entry in entries(folder, damaged=damaged):
        record = _follow(entry, unended, progress)
        if record is not None and record.request_id not in ended:
            ended.add(record.request_id)
            yield record
    for one in unended.values():
        if one.id not in ended:
            yield partial(one, progress.get(one.id))


def _follow(entry: Entry, unended: dict[str, Opened], progress: dict[str, Progress]) -> Record | None:
    """Keep account of what is open; the record, if the entry is one. A checksum that holds over nonsense was written
    by another version: the entry is left out, and said.
    """
    try:
        if entry.kind == frames.OPEN:
            opened = _decode_opened(entry.payload)
            unended[opened.id] = opened
        elif entry.kind == frames.PROGRESS:
            mark = _decode_progress(entry.payload)
            progress[mark.id] = mark
        elif entry.kind == frames.FINAL:
            record = _decode_record(entry.payload)
            unended.pop(record.request_id, None)
            progress.pop(record.request_id, None)
            return record
    except msgspec.DecodeError as error:
        _log.error("an entry of the journal cannot be understood: %s", error)
    return None


def partial(opened: Opened, progress: Progress | None) -> Record:
    """The record of a request whose gateway ended before it did."""
    if progress is None:
        usage = Usage(opened.request_bytes // _BYTES_PER_TOKEN, estimated=True)
        elapsed_s = 0.0
    else:
        usage = Usage(progress.prompt, progress.completion, progress.cached, progress.reasoning, estimated=True)
        elapsed_s = progress.elapsed_s
    return Record(
        at=opened.at,
        request_id=opened.id,
        route=opened.route,
        method=opened.method,
        status=0,  # what the client was told, nobody knows
        outcome="partial",
        key=opened.key,
        model=opened.model,
        provider=opened.provider,
        upstream=opened.upstream,
        stream=opened.stream,
        attempts=opened.attempts,
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        cached_tokens=usage.cached,
        reasoning_tokens=usage.reasoning,
        estimated=True,
        ttft_s=None,
        tpot_s=None,
        duration_s=elapsed_s,
        upstream_s=elapsed_s,
        request_bytes=opened.request_bytes,
        response_bytes=0,
        error=GATEWAY_ENDED,
        group=opened.group,
        cost=cost(usage, elapsed_s, opened.price),
    )


class Adopted:
    """A journal whose process is gone, held under its lock. `recovered`: records that were made for it now."""

    def __init__(self, folder: Path, lock_fd: int) -> None:
        self.folder = folder
        self._lock_fd = lock_fd
        self.recovered = 0
        self.damaged = Damaged()

    def finish(self) -> None:
        """Give every request that never ended its record. Raises OSError; then nothing is lost, and it can be tried
        again. Reads the whole journal, unless it was closed in order.
        """
        found = frames.segments(self.folder)
        if not found or _closed(found[-1][1]):
            return
        unended: dict[str, Opened] = {}
        progress: dict[str, Progress] = {}
        for entry in entries(self.folder, damaged=self.damaged):
            _follow(entry, unended, progress)
        records = [partial(one, progress.get(one.id)) for one in unended.values()]
        data = b"".join([frames.pack(frames.FINAL, encode(one)) for one in records]) + frames.CLOSE_FRAME
        _write_whole(frames.segment_path(self.folder, found[-1][0] + 1), data)
        self.recovered = len(records)
        if self.recovered:
            _log.warning("%d requests were open when their gateway ended: recorded as partial", self.recovered)
        for place in self.damaged.places:
            _log.error("the journal %s is damaged: %s could not be read", self.folder.name, place)

    def release(self) -> None:
        """Give up the lock and keep the journal, if it is still there."""
        lock_fd, self._lock_fd = self._lock_fd, -1
        if lock_fd >= 0:
            os.close(lock_fd)

    def remove(self) -> None:
        """Everything in it is elsewhere. May be called again."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        self.release()


def adopt(root: Path) -> Iterator[Adopted]:
    """Each journal below `root` whose process is gone, locked. The caller finishes and releases or removes it."""
    for folder in journals(root):
        try:
            lock_fd = os.open(folder / LOCK, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            continue
        if not (folder / LOCK).exists():  # removed by another process before the lock was ours
            os.close(lock_fd)
            continue
        yield Adopted(folder, lock_fd)


def _closed(newest: Path) -> bool:
    size = len(frames.CLOSE_FRAME)
    with newest.open("rb") as file:
        file.seek(max(0, newest.stat().st_size - size))
        return file.read() == frames.CLOSE_FRAME


def _write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    draft = path.with_suffix(".draft")
    fd = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    draft.rename(path)
