"""How a journal looks on disk: framed, checksummed entries in numbered segments.

A frame is a mark (4 bytes), the payload's length and CRC-32 (4 bytes each, little endian), its kind (1 byte) and the
payload, a JSON document. The mark begins with a byte that occurs in no UTF-8 text, so the next whole frame can be
found behind damage. The checksum starts from the kind, so that a changed kind is damage too.

A position is a place in a journal as one growing number: segment << 32 | byte offset behind a frame. It stays below
2**53, so Lua and JSON keep it exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

MARK: Final = b"\xf5LJ1"
_HEAD: Final = Struct("<4sIIB")
_HEAD_BYTES: Final = _HEAD.size
#: no frame is longer; a length beyond it is damage
PAYLOAD_MAX_BYTES: Final = 1024 * 1024

OPEN: Final = 1  # a request was admitted; the upstream has not been asked yet
PROGRESS: Final = 2  # what an open stream has used so far
FINAL: Final = 3  # the record of a finished request
CLOSE: Final = 4  # every request opened before this has its record, and nothing follows
_KINDS: Final = frozenset({OPEN, PROGRESS, FINAL, CLOSE})

SUFFIX: Final = ".seg"


class Frame(NamedTuple):
    """`end` is the offset behind it in its segment."""

    kind: int
    payload: bytes
    end: int


class Damage(NamedTuple):
    """Bytes that are no frame. `tail`: nothing readable follows, as after a write that was cut."""

    at: int
    length: int
    tail: bool


def pack(kind: int, payload: bytes) -> bytes:
    """One frame."""
    return _HEAD.pack(MARK, len(payload), crc32(payload, kind), kind) + payload


CLOSE_FRAME: Final = pack(CLOSE, b"")


def unpack(data: bytes) -> Iterator[Frame | Damage]:
    """Every whole frame in a segment's bytes, and what lies between them. Never raises."""
    at = 0
    size = len(data)
    while at < size:
        frame = _frame(data, at)
        if frame is not None:
            yield frame
            at = frame.end
            continue
        bad_at = at
        at = data.find(MARK, at + 1)
        while at >= 0 and _frame(data, at) is None:
            at = data.find(MARK, at + 1)
        if at < 0:
            yield Damage(bad_at, size - bad_at, tail=True)
            return
        yield Damage(bad_at, at - bad_at, tail=False)


def _frame(data: bytes, at: int) -> Frame | None:
    start = at + _HEAD_BYTES
    if start > len(data):
        return None
    mark, length, checksum, kind = _HEAD.unpack_from(data, at)
    end = start + length
    if mark != MARK or kind not in _KINDS or length > PAYLOAD_MAX_BYTES or end > len(data):
        return None
    payload = data[start:end]
    return Frame(kind, payload, end) if crc32(payload, kind) == checksum else None


def position(segment: int, end: int) -> int:
    return segment << 32 | end


def segment_of(place: int) -> int:
    return place >> 32


def offset_of(place: int) -> int:
    return place & 0xFFFFFFFF


def segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a journal by number. Empty if the folder is gone."""
    try:
        found = [(int(path.stem), path) for path in folder.iterdir() if path.suffix == SUFFIX and path.stem.isdecimal()]
    except FileNotFoundError:
        return []
    return sorted(found)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}{SUFFIX}"
