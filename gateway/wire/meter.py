"""What all meters share: what they tell, how they settle on a result, and how they hold a piece that has not ended."""

from __future__ import annotations

import re
from typing import Final, Protocol

from gateway.wire.ndjson import NdjsonSplitter
from gateway.wire.sse import SseSplitter
from gateway.wire.tokens import Report, Usage

#: an incomplete event longer than this is no usage chunk, so it need not wait for its end
HELD_BACK_BYTES: Final = 64 * 1024
#: of one event or one unstreamed answer that is kept to be read; longer ones are counted unread
KEPT_BYTES: Final = 8 * 1024 * 1024

# In JSON a quote inside a string is always escaped, so `"name":` can only be a member's name, at any depth.
CONTENT: Final = re.compile(
    rb'"(?:content|text|response|delta|reasoning_content|reasoning|thinking|partial_json|arguments|refusal'
    rb'|transcript)"\s*:\s*"(?!")'
)
TOOL_CALL: Final = re.compile(rb'"(?:tool_calls"\s*:\s*\[|function_call"\s*:)\s*\{')


class Meter(Protocol):
    """The tap on one answer's bytes. Times are the caller's monotonic seconds."""

    @property
    def usage(self) -> Usage | None:
        """The last usage reported so far that was not all zeros."""

    @property
    def events(self) -> int:
        """Events with generated text, reasoning or tool calls."""

    @property
    def first_content_at(self) -> float:
        """0.0 until seen."""

    @property
    def last_content_at(self) -> float:
        """A comment or an empty event does not move it."""

    @property
    def finished(self) -> bool:
        """The answer's own end was seen, and no error before it."""

    @property
    def error(self) -> str | None:
        """An error reported inside the answer, at most 500 characters."""

    def feed(self, data: bytes, now: float) -> bytes:
        """Count `data`; returns what to forward for it now (b"" while an incomplete event is held back)."""

    def finish(self) -> bytes:
        """The upstream ended cleanly: returns what is still held back. Not to be called for a cut answer."""

    @property
    def torn(self) -> bool:
        """Part of an event that has not ended was returned already: nothing that follows it can be understood."""

    def result(self, prompt_estimate: int) -> Usage:
        """What was reported; else counted from the events, with `prompt_estimate`, and flagged estimated."""


class Count:
    """What all meters keep, and how they settle on a result."""

    __slots__ = ("_one_of", "error", "events", "finished", "first_content_at", "last_content_at", "usage")

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.events = 0
        self.first_content_at = 0.0
        self.last_content_at = 0.0
        self.finished = False
        self.error: str | None = None
        self._one_of = ""  # how the choices of n are accounted for, where each is apart

    def result(self, prompt_estimate: int) -> Usage:
        return self._settle(prompt_estimate, self.events)

    @property
    def torn(self) -> bool:
        return False

    def _settle(self, prompt_estimate: int, counted: int) -> Usage:
        seen = self.usage
        if seen is None:
            return Usage(prompt_estimate, counted, estimated=True)
        # A report from before a cut is behind what was relayed, and nothing is generated from no prompt at all.
        behind = counted > seen.completion and (not self.finished or not seen.completion)
        completion = counted if behind else seen.completion
        unknown = not seen.prompt
        prompt = prompt_estimate if unknown else seen.prompt
        return Usage(prompt, completion, seen.cached, seen.reasoning, estimated=behind or unknown)

    def _content(self, now: float) -> None:
        self.events += 1
        self.last_content_at = now
        if not self.first_content_at:
            self.first_content_at = now

    def _report(self, report: Report) -> None:
        usage = report.usage
        if usage is not None and (usage.prompt or usage.completion):
            if report.one_of:
                if self.usage is not None and self._one_of == report.one_of:
                    usage.completion += self.usage.completion
                    usage.prompt, usage.cached = max(usage.prompt, self.usage.prompt), self.usage.cached
                self._one_of = report.one_of
            if self.usage is not None and not usage.prompt:  # Anthropic tells the prompt first, then the rest
                usage.prompt, usage.cached = self.usage.prompt, self.usage.cached
            self.usage = usage
        if report.error is not None:
            self._fail(report.error)

    def _fail(self, error: str) -> None:
        if self.error is None:
            self.error = error
        self.finished = False

    def _end(self) -> None:
        if self.error is None:  # vLLM sends [DONE] after an error, too
            self.finished = True

    def __repr__(self) -> str:
        state = self.error or ("finished" if self.finished else "open")
        return f"<{type(self).__name__} events={self.events} {self.usage} {state}>"


class PieceMeter(Count):
    """A meter of a stream of pieces (events, lines), which may be cut anywhere on their way.

    Bytes that end with a piece are returned as they were given. One that has not ended waits for its end (up to
    `HELD_BACK_BYTES`), so that an error can still follow the piece before it. `strip`: `_piece` says which go out.
    """

    __slots__ = ("_cut_cr", "_fed_at", "_released", "_splitter", "_strip", "_unread")

    def __init__(self, splitter: SseSplitter | NdjsonSplitter, *, strip: bool = False) -> None:
        super().__init__()
        self._splitter = splitter
        self._strip = strip
        self._fed_at = 0.0
        self._released = 0  # bytes of the held piece that were forwarded already
        self._unread = False  # the held piece is longer than KEPT_BYTES
        self._cut_cr = False  # the last piece was removed, and ended in CR: an LF that follows goes with it

    def _piece(self, piece: bytes, now: float) -> bool:
        """Count one whole piece; True if it is a usage chunk that carries nothing else."""
        raise NotImplementedError

    def _feed_split(self, data: bytes, now: float) -> bytes:
        splitter = self._splitter
        self._fed_at = now
        held_before = splitter.inside
        out: list[bytes] = []
        for piece in splitter.feed(data):
            forwarded, self._released = self._released, 0
            if self._unread:
                self._unread = False
                self._content(now)
                removed = False
            else:
                removed = self._piece(piece, now) and self._strip and not forwarded
            if removed or (self._cut_cr and piece == b"\n"):
                self._cut_cr = piece.endswith(b"\r")
            else:
                self._cut_cr = False
                out.append(piece[forwarded:])
        if splitter.held_bytes > HELD_BACK_BYTES:
            out.append(data if self._released else splitter.held())
            self._released = splitter.held_bytes
        if splitter.held_bytes > KEPT_BYTES:
            splitter.forget()
            self._unread, self._released = True, 0
        return data if not (self._strip or held_before or splitter.inside) else b"".join(out)

    @property
    def torn(self) -> bool:
        return self._released > 0 or self._unread

    def finish(self) -> bytes:
        rest = self._splitter.rest()
        forwarded, self._released = self._released, 0
        if not rest:
            return b""
        removed = not self._unread and self._piece(rest, self._fed_at) and self._strip and not forwarded
        return b"" if removed else rest[forwarded:]
