"""Server-sent events: cut a stream of bytes into events without changing a byte, and read one event.

Implements the event stream format of the HTML standard ("Server-sent events", 9.2.5 and 9.2.6): lines end in CR, LF
or CRLF, an empty line ends an event, a BOM may come first. Time is linear in the bytes, however they are cut.
"""

from __future__ import annotations

import re

# Atomic: CRLF is one line end, never a CR and an LF of its own.
_BOUNDARY = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"(?>\r\n|\n|\r)")
_BOM = b"\xef\xbb\xbf"


class SseSplitter:
    """Feed it bytes in any split; it gives whole events, each with the empty line that ends it.

    The pieces given, joined, are the bytes fed. An event that ends in a bare CR is given at once; the LF that may
    follow it in the next read then comes as a piece of its own (`b"\\n"`), so that no event waits for another.
    """

    __slots__ = ("_after_cr", "_edge", "_held", "held_bytes", "inside")

    def __init__(self) -> None:
        self._held: list[bytes] = []  # the incomplete event, as it came
        self._edge = b""  # its last two bytes: an empty line may straddle two reads
        self._after_cr = False
        self.held_bytes = 0
        self.inside = False  # an event has begun and not ended

    @property
    def at_boundary(self) -> bool:
        """Nothing is held, and no byte to come can belong to an event already given."""
        return not self.inside and not self._after_cr

    def feed(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        start = 0
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == 10:
                events.append(b"\n")
                start = 1
        elif self.inside:
            end = self._end_in(data)
            if not end:
                self._hold(data)
                return events
            self._held.append(data[:end])
            events.append(self.rest())
            start = end
        for match in _BOUNDARY.finditer(data, start):
            events.append(data[start : match.end()])
            start = match.end()
        if start < len(data):
            self._hold(data[start:] if start else data)
        elif events:
            self._after_cr = events[-1].endswith(b"\r")
        return events

    def held(self) -> bytes:
        """The incomplete event, as far as it came."""
        return b"".join(self._held)

    def rest(self) -> bytes:
        """Take the incomplete event: it is given, as at the end of the stream."""
        rest = b"".join(self._held)
        self.forget()
        self._edge, self.inside = b"", False
        return rest

    def forget(self) -> None:
        """Drop what is held but stay inside the event: only what comes after this will be given as it ends."""
        self._held, self.held_bytes = [], 0

    def _end_in(self, data: bytes) -> int:
        """Where in `data` the event that is held ends; 0 if it does not."""
        seam = len(self._edge)
        found = _BOUNDARY.search(self._edge + data[:3])  # a boundary is at most four bytes long
        if found is not None and found.start() < seam:
            return found.end() - seam
        found = _BOUNDARY.search(data)
        return 0 if found is None else found.end()

    def _hold(self, piece: bytes) -> None:
        self._held.append(piece)
        self.held_bytes += len(piece)
        self._edge = (self._edge + piece[-2:])[-2:]
        self.inside = True


def parse_event(event: bytes) -> tuple[bytes, bytes]:
    """Name and data of one event, as the standard says: data lines joined by LF, comments and other fields dropped."""
    if event.startswith(_BOM):
        event = event[3:]
    end = event.find(b"\n")
    if end < 0:
        end = len(event)
    if event.startswith(b"data:") and end >= len(event) - 2 and 13 not in event:  # the usual one line
        return b"", event[6 if event[5:6] == b" " else 5 : end]
    name, data = b"", []
    for line in event.split(b"\n") if b"\r" not in event else _LINE_END.split(event):
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line.startswith(b"event:"):
            name = line[7:] if line[6:7] == b" " else line[6:]
    return name, data[0] if len(data) == 1 else b"\n".join(data)
