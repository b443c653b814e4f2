"""Meters of JSON documents: one a line (Ollama's native streams), or one for the whole answer."""

from __future__ import annotations

import re
from typing import Final

from gateway.wire.meter import CONTENT, KEPT_BYTES, TOOL_CALL, Count, PieceMeter
from gateway.wire.ndjson import NdjsonSplitter
from gateway.wire.tokens import Usage, answer_usage, read

_DONE_LINE: Final = re.compile(rb'"done"\s*:\s*true|"status"\s*:\s*"success"')
_JSON_TEXT: Final = re.compile(rb'"(?:content|text|response|arguments)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)')


class NdjsonMeter(PieceMeter):
    """Ollama's native streams: one JSON object a line, counters on the line that says `"done": true`."""

    __slots__ = ("_needle", "_skip")

    def __init__(self) -> None:
        super().__init__(NdjsonSplitter())
        self._needle = b"\0"
        self._skip = 1

    def feed(self, data: bytes, now: float) -> bytes:
        if not self._splitter.inside and data.find(b"\n") == len(data) - 1:
            self._piece(data, now)
            return data
        return self._feed_split(data, now)

    def _piece(self, piece: bytes, now: float) -> bool:
        at = piece.rfind(self._needle)
        if (
            at >= 0
            and piece[at + self._skip : at + self._skip + 1] != b'"'
            and (piece.rfind(b'"done":false') >= 0 or piece.rfind(b'"done": false') >= 0)
        ):
            self._content(now)
            return False
        content = CONTENT.search(piece)
        if content is not None:
            self._needle = content[0]
            self._skip = len(self._needle)
            self._content(now)
        elif TOOL_CALL.search(piece) is not None:
            self._content(now)
        if b'"error"' in piece or b"eval_count" in piece:
            report = read(piece)
            if report is not None:
                self._report(report)
        if _DONE_LINE.search(piece) is not None:
            self._end()
        return False


class JsonMeter(Count):
    """An unstreamed answer: the pieces are kept (by reference, up to KEPT_BYTES) and read once, at the end."""

    __slots__ = ("_kept", "_kept_bytes", "_skipped")

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._skipped = False  # too long, or no JSON: nothing is kept

    def feed(self, data: bytes, now: float) -> bytes:
        if self._skipped or not data:
            return data
        if not self.events:
            self._content(now)
            if data.lstrip()[:1] not in (b"{", b"[", b""):
                self._skipped = True
                return data
        self.last_content_at = now
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes > KEPT_BYTES:
            self._skipped = True
            self._kept.clear()
        return data

    def finish(self) -> bytes:
        self.finished = True  # the framing says so; only an error inside can deny it
        document = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
        usage = answer_usage(document)
        if usage is not None:
            self.usage = usage
            return b""
        report = read(document)
        if report is not None:
            self._report(report)
        return b""

    def result(self, prompt_estimate: int) -> Usage:
        """Without a report the text is counted as four bytes a token; an unread answer has no completion."""
        if self.usage is not None and self.finished:
            return self._settle(prompt_estimate, 0)
        text_bytes = sum(len(text[1]) for text in _JSON_TEXT.finditer(b"".join(self._kept)))
        return self._settle(prompt_estimate, (text_bytes + 3) // 4)
