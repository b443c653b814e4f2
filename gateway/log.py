"""Logging: one JSON line for each finished request, and plain operational messages through `logging`.

Request lines are gathered and written at most every `FLUSH_S`, in one system call: under load a line then costs
little more than its own JSON. Nothing here sees a prompt, an answer or a credential.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import stat
import sys
import traceback
from typing import Final

FLUSH_S: Final = 0.05
MAX_HELD_BYTES: Final = 1024 * 1024
#: a pipe that says it can be written to takes this much at once (POSIX: PIPE_BUF, on Linux one page)
PIPE_BYTES: Final = 4096


class RequestLog:
    """Writes JSON lines to a file descriptor (stderr by default)."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._lines: list[bytes] = []
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        #: asked before each write to what may block (a pipe, a socket, a terminal); None for a plain file
        self._poll: select.poll | None = None
        if not stat.S_ISREG(os.fstat(fd).st_mode) and hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)
        self.dropped = 0  # lines given up because the reader of our output does not read

    def post(self, line: bytes) -> None:
        """One record, encoded (`ledger.record.encode`)."""
        if self._held_bytes > MAX_HELD_BYTES:
            self.dropped += 1
            return
        self._lines.append(line)
        self._held_bytes += len(line) + 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def lost(self) -> int:
        """Lines given up so far."""
        return self.dropped

    def flush(self) -> None:
        """Write what is held. A pipe that is full takes what it can; the rest waits for the next turn."""
        self._timer = None
        if not self._lines:
            return
        data = b"\n".join(self._lines) + b"\n"
        self._lines.clear()
        self._held_bytes = 0
        try:
            written = self._write(data)
        except OSError:  # nobody can be told that the log is gone
            self.dropped += data.count(b"\n")
            return
        if written < len(data):
            self._lines.append(data[written:-1])
            self._held_bytes = len(data) - written
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def _write(self, data: bytes) -> int:
        """Write as much as can be written without waiting: a full pipe must not stop the event loop."""
        if self._poll is None:
            return os.write(self._fd, data)
        written = 0
        view = memoryview(data)
        while written < len(data) and self._poll.poll(0):
            try:
                written += os.write(self._fd, view[written : written + PIPE_BYTES])
            except BlockingIOError:
                break
        return written


def trace(error: BaseException) -> str:
    """Where an exception came from: its type and the lines of code, and those of what caused it.

    Its text is left out, and so are all values: a message such as KeyError's may hold a request's own bytes, which
    must not reach a log.
    """
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < 8:
        frames = traceback.format_list(traceback.extract_tb(seen.__traceback__, limit=-12))
        parts.append(f"Traceback (most recent call last):\n{''.join(frames)}{type(seen).__name__}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\ncaused by:\n".join(parts)


def setup(level: str = "info") -> None:
    """Send operational messages to stderr. Libraries may warn; they may not chat."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("gateway").setLevel(level.upper())
