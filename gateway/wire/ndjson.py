"""Newline-delimited JSON: cut a stream of bytes into lines without changing a byte. Time is linear in the bytes."""

from __future__ import annotations


class NdjsonSplitter:
    """Feed it bytes in any split; it gives whole lines, each with its LF. The pieces, joined, are the bytes fed."""

    __slots__ = ("_held", "held_bytes", "inside")

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self.held_bytes = 0
        self.inside = False  # a line has begun and not ended

    def feed(self, data: bytes) -> list[bytes]:
        lines = data.splitlines(keepends=True) if b"\r" not in data else _lines(data)
        if not lines:
            return []
        if self.inside and lines[0].endswith(b"\n"):
            self._held.append(lines[0])
            lines[0] = self.rest()
        if not lines[-1].endswith(b"\n"):
            last = lines.pop()
            self._held.append(last)
            self.held_bytes += len(last)
            self.inside = True
        return lines

    def held(self) -> bytes:
        """The incomplete line, as far as it came."""
        return b"".join(self._held)

    def rest(self) -> bytes:
        """Take what is held: the line without an end at the end of the stream."""
        rest = b"".join(self._held)
        self.forget()
        self.inside = False
        return rest

    def forget(self) -> None:
        """Drop what is held but stay inside the line: only what comes after this will be given as it ends."""
        self._held, self.held_bytes = [], 0


def _lines(data: bytes) -> list[bytes]:
    """`splitlines` that ends a line at LF only: a CR is white space in JSON."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    if parts[-1]:
        lines.append(parts[-1])
    return lines
