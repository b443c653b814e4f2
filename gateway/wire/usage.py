"""The token meter: counts an answer as its bytes pass to the client, without changing them.

A meter sits between the upstream's bytes and the client's. `SseMeter` and `NdjsonMeter` look at each event once with
`bytes.find` and parse JSON only where usage or an error is reported; `JsonMeter` reads an unstreamed answer at its
end. The one change a meter may make is to remove a usage chunk that the gateway asked for and the client did not.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.wire.documents import JsonMeter, NdjsonMeter
from gateway.wire.meter import CONTENT, TOOL_CALL, Meter, PieceMeter
from gateway.wire.sse import SseSplitter, parse_event
from gateway.wire.tokens import Usage, message_text, read, usage_from_json

__all__ = ["JsonMeter", "Meter", "NdjsonMeter", "SseMeter", "Usage", "new_meter", "usage_from_json"]

_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"(?!")')
_TYPE: Final = re.compile(
    rb'"type"\s*:\s*"(response\.[\w.]+|content_block_\w+|message_(?:start|delta|stop)|ping|error)"'
)

#: the rest of a JSON string, but for its closing quote
_WORDS: Final = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*(?=")')
#: of events that are longer than this, what stands around their words is not kept
_ALIKE_BYTES: Final = 2048
_NEVER: Final = 1 << 62

_ENDS: Final = frozenset({b"message_stop", b"response.completed", b"response.incomplete"})


def _member(pattern: re.Pattern[bytes], name: bytes, data: bytes) -> re.Match[bytes] | None:
    """`pattern.search(data)` for a pattern that begins with `name`: `bytes.find` skips through megabytes faster."""
    at = data.find(name)
    while at >= 0:
        match = pattern.match(data, at)
        if match is not None:
            return match
        at = data.find(name, at + 1)
    return None


class SseMeter(PieceMeter):
    """Server-sent events of OpenAI chat, completions and Responses, and Anthropic Messages.

    `strip_usage`: the gateway asked for the usage chunk, so it is removed. A usage that rides on a chunk with text or
    a finish_reason stays. Bytes that end with an event, as they nearly always come, are returned as the very object
    that was given; an event that has not ended waits for its end (up to `HELD_BACK_BYTES`), so that an error can
    still follow the event before it.
    """

    __slots__ = (
        "_after",
        "_before",
        "_learn_at",
        "_learnt_at",
        "_least",
        "_needle",
        "_plain",
        "_prefix",
        "_skip",
        "_words_end",
        "begun",
    )

    _splitter: SseSplitter

    def __init__(self, strip_usage: bool = False) -> None:
        super().__init__(SseSplitter(), strip=strip_usage)
        self.begun = b""  # the data of `response.created`, with which a stream of Responses begins
        self._plain = True  # nothing is held: whole events may be read without the splitter
        # How this stream's content events look, learnt from the first; `find` is all the next ones then need.
        self._prefix = b"\0"
        self._needle = b"\0"
        self._skip = 1
        # What stands before and after the words of the last of them that was looked at, its "\n\n" included; and, in
        # events, when that was, and from when on it may be learnt anew.
        self._before = self._after = b""
        self._least = _NEVER
        self._words_end = 0
        self._learnt_at = self._learn_at = 0

    def feed(self, data: bytes, now: float) -> bytes:
        if (
            len(data) > self._least
            and data.startswith(self._before)
            and data.endswith(self._after)
            and data.find(b'"', len(self._before), self._words_end) < 0
            and self._plain
        ):
            # Most reads of most streams: one event, which differs from the one before in its words alone. (Two would
            # have quotes between.)
            self.events += 1
            self.last_content_at = now
            return data
        if self._plain and 13 not in data and data.endswith(b"\n\n"):
            last = len(data) - 2
            if data.find(b"\n") == last or data.find(b"\n\n") == last:  # one event; a single byte is found faster
                return b"" if self._piece(data, now) and self._strip else data
            events = data.split(b"\n\n")
            if events.pop():  # an empty line more than an event's end
                return self._split(data, now)
            kept = [event for event in events if not self._piece(event, now) or not self._strip]
            if len(kept) == len(events):
                return data
            kept.append(b"")
            return b"\n\n".join(kept) if len(kept) > 1 else b""
        return self._split(data, now)

    def _split(self, data: bytes, now: float) -> bytes:
        out = self._feed_split(data, now)
        self._plain = self._splitter.at_boundary
        return out

    def _piece(self, piece: bytes, now: float) -> bool:
        """Count one event; True if it is a usage chunk that carries nothing else."""
        if piece.startswith(self._prefix):
            at = piece.rfind(self._needle)
            if at >= 0 and piece[at + self._skip : at + self._skip + 1] != b'"':
                self.events += 1
                self.last_content_at = now
                if not self.first_content_at:
                    self.first_content_at = now
                # rfind: for needles of this length CPython's is twice as fast as find and `in`
                more = False
                if (
                    piece.rfind(b'"finish_reason":"') >= 0 or piece.rfind(b'"finish_reason": "') >= 0
                ) and _FINISH.search(piece) is not None:
                    self._end()
                    more = True
                if piece.rfind(b'"usage"') >= 0 and piece.rfind(b'"usage":null') < 0:
                    report = read(parse_event(piece)[1])
                    if report is not None:
                        self._report(report)
                    more = True
                if not more and self.events >= self._learn_at:
                    self._learn_words(piece, at + self._skip)
                return False
        return self._read(piece, now)

    def _read(self, event: bytes, now: float) -> bool:
        """The whole look at one event, for all that the short one in `_piece` does not know."""
        name, data = parse_event(event)
        if not data:
            return False
        if data.strip() == b"[DONE]":
            self._end()
            return False
        kind = name
        if not name or name == b"message":
            typed = _member(_TYPE, b'"type"', data)
            kind = b"" if typed is None else typed[1]
        content: re.Match[bytes] | None = None
        if kind.startswith(b"response."):
            if kind.endswith(b".delta"):
                content = CONTENT.search(data)
            elif kind == b"response.created":
                self.begun = data
        elif kind.startswith(b"content_block_"):
            if kind == b"content_block_delta":
                content = CONTENT.search(data)
        elif not kind.startswith((b"message_", b"ping", b"error")):
            content = CONTENT.search(data)
            if content is None and TOOL_CALL.search(data) is not None:
                self._content(now)
            if _member(_FINISH, b'"finish_reason"', data) is not None:
                self._end()
        if content is not None:
            self._content(now)
            self._learn(event, kind, name, content)
        report = None
        if b'"usage"' in data or b'"timings"' in data or b'"error"' in data or kind == b"error":
            report = read(data)
            if report is not None:
                self._report(report)
        if kind in _ENDS:
            self._end()
        elif (kind == b"error" or kind == b"response.failed") and self.error is None:
            self._fail(message_text(data))
        return report is not None and report.trailing and content is None

    def _learn(self, event: bytes, kind: bytes, name: bytes, content: re.Match[bytes]) -> None:
        if not name and not kind:
            self._prefix = b"data:"
        elif name and event.startswith(prefix := b"event: " + name + b"\ndata:"):
            self._prefix = prefix
        else:
            return
        self._needle = content[0]
        self._skip = len(self._needle)

    def _learn_words(self, event: bytes, words_at: int) -> None:
        """Remember what stands around the words of an event that has nothing but words in it.

        Where that did not last (several choices in turn, a number in each event), it is learnt more and more rarely.
        """
        gap = self._learn_at - self._learnt_at
        lasted = self.events - self._learnt_at > 2 * gap
        self._learnt_at = self.events
        self._learn_at = self.events + (1 if lasted else min(2 * gap, 256))
        found = _WORDS.match(event, words_at) if len(event) <= _ALIKE_BYTES and 13 not in event else None
        if found is None:
            self._least = _NEVER
            return
        self._before = event[:words_at]
        self._after = event[found.end() :].rstrip(b"\n") + b"\n\n"
        self._words_end = -len(self._after)
        self._least = len(self._before) + len(self._after)


def new_meter(content_type: str | bytes, strip_usage: bool = False) -> SseMeter | NdjsonMeter | JsonMeter:
    """The meter for an answer of this Content-Type (parameters and case do not matter; "" for none)."""
    kind = content_type.encode("latin-1", "replace") if isinstance(content_type, str) else content_type
    if kind == b"application/json":
        return JsonMeter()
    kind = kind.partition(b";")[0].strip().lower()
    if kind == b"text/event-stream":
        return SseMeter(strip_usage)
    if kind in (b"application/x-ndjson", b"application/ndjson", b"application/jsonl"):
        return NdjsonMeter()
    return JsonMeter()
