"""The token meter: counts an answer as its bytes pass to the client, without changing them.

A meter sits between the upstream's bytes and the client's. `SseMeter` and `NdjsonMeter` look at each event once with
`bytes.find` and parse JSON only where usage or an error is reported; `JsonMeter` reads an unstreamed answer at its
end. The one change a meter may make is to remove a usage chunk that the gateway asked for and the client did not.
"""

from __future__ import annotations

import re
from typing import Protocol

from gateway.wire.ndjson import NdjsonSplitter
from gateway.wire.sse import SseSplitter, parse_event
from gateway.wire.tokens import Report, Usage, answer_usage, message_text, read, usage_from_json

__all__ = ["JsonMeter", "Meter", "NdjsonMeter", "SseMeter", "Usage", "new_meter", "usage_from_json"]

#: an incomplete event longer than this is no usage chunk, so it need not wait for its end
HELD_BACK_BYTES = 64 * 1024
#: of one event or one unstreamed answer that is kept to be read; longer ones are counted unread
KEPT_BYTES = 8 * 1024 * 1024

# In JSON a quote inside a string is always escaped, so `"name":` can only be a member's name, at any depth.
_CONTENT = re.compile(
    rb'"(?:content|text|response|delta|reasoning_content|reasoning|thinking|partial_json|arguments|refusal'
    rb'|transcript)"\s*:\s*"(?!")'
)
_TOOL_CALL = re.compile(rb'"(?:tool_calls"\s*:\s*\[|function_call"\s*:)\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(?!")')
_TYPE = re.compile(rb'"type"\s*:\s*"(response\.[\w.]+|content_block_\w+|message_(?:start|delta|stop)|ping|error)"')
_DONE_LINE = re.compile(rb'"done"\s*:\s*true|"status"\s*:\s*"success"')
_JSON_TEXT = re.compile(rb'"(?:content|text|response|arguments)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)')

_ENDS = frozenset({b"message_stop", b"response.completed", b"response.incomplete"})


def _member(pattern: re.Pattern[bytes], name: bytes, data: bytes) -> re.Match[bytes] | None:
    """`pattern.search(data)` for a pattern that begins with `name`: `bytes.find` skips through megabytes faster."""
    at = data.find(name)
    while at >= 0:
        match = pattern.match(data, at)
        if match is not None:
            return match
        at = data.find(name, at + 1)
    return None


class Meter(Protocol):
    """The tap on one answer's bytes. Times are the caller's monotonic seconds."""

    usage: Usage | None  # the last usage reported so far that was not all zeros
    events: int  # events with generated text, reasoning or tool calls
    first_content_at: float  # 0.0 until seen
    last_content_at: float  # a comment or an empty event does not move it
    finished: bool  # the answer's own end was seen, and no error before it
    error: str | None  # an error reported inside the answer, at most 500 characters

    def feed(self, data: bytes, now: float) -> bytes:
        """Count `data`; returns what to forward for it now (b"" while an incomplete event is held back)."""

    def finish(self) -> bytes:
        """The upstream ended cleanly: returns what is still held back. Not to be called for a cut answer."""

    @property
    def torn(self) -> bool:
        """Part of an event that has not ended was returned already: nothing that follows it can be understood."""

    def result(self, prompt_estimate: int) -> Usage:
        """What was reported; else counted from the events, with `prompt_estimate`, and flagged estimated."""


class _Count:
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


class SseMeter(_Count):
    """Server-sent events of OpenAI chat, completions and Responses, and Anthropic Messages.

    `strip_usage`: the gateway asked for the usage chunk, so it is removed. A usage that rides on a chunk with text or
    a finish_reason stays. Bytes that end with an event, as they nearly always come, are returned as the very object
    that was given; an event that has not ended waits for its end (up to `HELD_BACK_BYTES`), so that an error can
    still follow the event before it.
    """

    __slots__ = (
        "_cut_cr",
        "_fed_at",
        "_needle",
        "_plain",
        "_prefix",
        "_released",
        "_skip",
        "_splitter",
        "_strip",
        "_unread",
    )

    def __init__(self, strip_usage: bool = False) -> None:
        super().__init__()
        self._strip = strip_usage
        self._splitter = SseSplitter()
        self._plain = True  # nothing is held: whole events may be read without the splitter
        self._fed_at = 0.0
        self._released = 0  # bytes of the held event that were forwarded already
        self._unread = False  # the held event is longer than KEPT_BYTES
        self._cut_cr = False  # the last event was removed, and ended in CR: an LF that follows goes with it
        # How this stream's content events look, learnt from the first; `find` is all the next ones then need.
        self._prefix = b"\0"
        self._needle = b"\0"
        self._skip = 1

    def feed(self, data: bytes, now: float) -> bytes:
        if self._plain and 13 not in data and data.endswith(b"\n\n"):
            last = len(data) - 2
            if data.find(b"\n") == last or data.find(b"\n\n") == last:  # one event; a single byte is found faster
                # Most reads of most streams: one event like the one before. Counted here, without a further call;
                # rfind, because for needles of this length CPython's is twice as fast as find and `in`.
                if (
                    self.first_content_at
                    and data.startswith(self._prefix)
                    and (at := data.rfind(self._needle)) >= 0
                    and data[at + self._skip] != 34
                    and data.rfind(b'"finish_reason":"') < 0
                    and data.rfind(b'"finish_reason": "') < 0
                    and data.rfind(b'"usage"') < 0
                ):
                    self.events += 1
                    self.last_content_at = now
                    return data
                return b"" if self._event(data, now) and self._strip else data
            events = data.split(b"\n\n")
            if events.pop():  # an empty line more than an event's end
                return self._feed_split(data, now)
            kept = [event for event in events if not self._event(event, now) or not self._strip]
            if len(kept) == len(events):
                return data
            kept.append(b"")
            return b"\n\n".join(kept) if len(kept) > 1 else b""
        return self._feed_split(data, now)

    def _feed_split(self, data: bytes, now: float) -> bytes:
        splitter = self._splitter
        self._fed_at = now
        held_before = splitter.inside
        out: list[bytes] = []
        for event in splitter.feed(data):
            forwarded, self._released = self._released, 0
            if self._unread:
                self._unread = False
                self._content(now)
                removed = False
            else:
                removed = self._event(event, now) and self._strip and not forwarded
            if removed or (self._cut_cr and event == b"\n"):
                self._cut_cr = event.endswith(b"\r")
            else:
                self._cut_cr = False
                out.append(event[forwarded:])
        self._plain = splitter.at_boundary
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
        self._plain = True
        forwarded, self._released = self._released, 0
        if not rest:
            return b""
        removed = not self._unread and self._event(rest, self._fed_at) and self._strip and not forwarded
        return b"" if removed else rest[forwarded:]

    def _event(self, event: bytes, now: float) -> bool:
        """Count one event; True if it is a usage chunk that carries nothing else."""
        if event.startswith(self._prefix):
            at = event.rfind(self._needle)
            if at >= 0 and event[at + self._skip : at + self._skip + 1] != b'"':
                self.events += 1
                self.last_content_at = now
                if not self.first_content_at:
                    self.first_content_at = now
                # rfind: for needles of this length CPython's is twice as fast as find and `in`
                if (
                    event.rfind(b'"finish_reason":"') >= 0 or event.rfind(b'"finish_reason": "') >= 0
                ) and _FINISH.search(event) is not None:
                    self._end()
                if event.rfind(b'"usage"') >= 0 and event.rfind(b'"usage":null') < 0:
                    report = read(parse_event(event)[1])
                    if report is not None:
                        self._report(report)
                return False
        return self._read(event, now)

    def _read(self, event: bytes, now: float) -> bool:
        """The whole look at one event, for all that the short one in `_event` does not know."""
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
                content = _CONTENT.search(data)
        elif kind.startswith(b"content_block_"):
            if kind == b"content_block_delta":
                content = _CONTENT.search(data)
        elif not kind.startswith((b"message_", b"ping", b"error")):
            content = _CONTENT.search(data)
            if content is None and _TOOL_CALL.search(data) is not None:
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


class NdjsonMeter(_Count):
    """Ollama's native streams: one JSON object a line, counters on the line that says `"done": true`."""

    __slots__ = ("_fed_at", "_needle", "_released", "_skip", "_splitter", "_unread")

    def __init__(self) -> None:
        super().__init__()
        self._splitter = NdjsonSplitter()
        self._fed_at = 0.0
        self._released = 0  # bytes of the held line that were forwarded already
        self._unread = False
        self._needle = b"\0"
        self._skip = 1

    def feed(self, data: bytes, now: float) -> bytes:
        splitter = self._splitter
        if not splitter.inside and data.find(b"\n") == len(data) - 1:
            self._line(data, now)
            return data
        self._fed_at = now
        held_before = splitter.inside
        out: list[bytes] = []
        for line in splitter.feed(data):
            forwarded, self._released = self._released, 0
            if self._unread:
                self._unread = False
                self._content(now)
            else:
                self._line(line, now)
            out.append(line[forwarded:])
        if splitter.held_bytes > HELD_BACK_BYTES:
            out.append(data if self._released else splitter.held())
            self._released = splitter.held_bytes
        if splitter.held_bytes > KEPT_BYTES:
            splitter.forget()
            self._unread, self._released = True, 0
        return data if not (held_before or splitter.inside) else b"".join(out)

    @property
    def torn(self) -> bool:
        return self._released > 0 or self._unread

    def finish(self) -> bytes:
        rest = self._splitter.rest()
        forwarded, self._released = self._released, 0
        if rest and not self._unread:
            self._line(rest, self._fed_at)
        return rest[forwarded:]

    def _line(self, line: bytes, now: float) -> None:
        at = line.rfind(self._needle)
        if (
            at >= 0
            and line[at + self._skip : at + self._skip + 1] != b'"'
            and (line.rfind(b'"done":false') >= 0 or line.rfind(b'"done": false') >= 0)
        ):
            self._content(now)
            return
        content = _CONTENT.search(line)
        if content is not None:
            self._needle = content[0]
            self._skip = len(self._needle)
            self._content(now)
        elif _TOOL_CALL.search(line) is not None:
            self._content(now)
        if b'"error"' in line or b"eval_count" in line:
            report = read(line)
            if report is not None:
                self._report(report)
        if _DONE_LINE.search(line) is not None:
            self._end()


class JsonMeter(_Count):
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
