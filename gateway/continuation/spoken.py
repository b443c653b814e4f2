"""Spoken: what an answer has said so far, read out of the bytes that went to the client, a few kilobytes at a time.

Most events of most streams differ by their text only, and by the time, which llama.cpp writes into each. So the first
ones are read as JSON, and what stands around their text is remembered; as long as that fits, kilobytes of events are
split at it in one call, at a tenth of the cost.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.json import Decoder

from gateway.wire.sse import SseSplitter, parse_event
from gateway.wire.tokens import UNREADABLE, read

#: relayed bytes that are kept before their text is read out of them: some forty events
UNREAD_BYTES: Final = 8 * 1024
#: the same at the beginning, which is read event by event
FIRST_BYTES: Final = 768
#: of text that is kept: some 64,000 tokens. Memory is for many streams, and a client that reads slowly holds much, too.
TEXT_BYTES: Final = 256 * 1024

#: what comes in more at once is no answer of words, and not worth the time to read it
AT_ONCE_BYTES: Final = 1024 * 1024


class Identity(Struct):
    """What every chunk of a stream repeats, as JSON."""

    id: Raw | UnsetType = UNSET
    created: Raw | UnsetType = UNSET
    model: Raw | UnsetType = UNSET
    system_fingerprint: Raw | UnsetType = UNSET
    object: Raw | UnsetType = UNSET


class _Delta(Struct):
    role: str | None = None
    content: str | None = None
    tool_calls: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: Raw | UnsetType = UNSET


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Raw | UnsetType = UNSET


class _Chunk(Struct):
    choices: list[_Choice] = []


_chunk = Decoder(_Chunk)
_identity = Decoder(Identity)
_string = Decoder(str)
_TEXT: Final = re.compile(rb'"(?:content|text)"\s*:\s*"((?:[^"\\]|\\.)+)"')
_CREATED: Final = b'"created":'
_MARK: Final = "where the text stood"
_NOTHING: Final = (b"null", b"[]", b"{}")


class Spoken:
    """Append what is sent to `unread`, whole events; call `read` before looking at anything else.

    `tokens` counts the events with text, `blanks` those at the end whose text is nothing but white space. `plain`: so
    far it is one choice of nothing but text, not too long; once it is not, nothing is kept.
    """

    __slots__ = (
        "_alike",
        "_splitter",
        "_text",
        "_text_bytes",
        "blanks",
        "done",
        "finished",
        "identity",
        "plain",
        "tokens",
        "unread",
    )

    def __init__(self) -> None:
        #: what was sent since the last `read`, which is due whenever it is UNREAD_BYTES or more
        self.unread: list[bytes] = []
        self._splitter = SseSplitter()
        #: what stands before and after the text of the last event that was read, and the time in it
        self._alike: tuple[bytes, bytes, bytes] | None = None
        self._text: list[bytes] = []
        self._text_bytes = 0
        self.identity: Identity | None = None  # of the first chunk
        self.tokens = 0
        self.blanks = 0
        self.plain = True
        self.finished = False  # a finish_reason was among it
        self.done = False  # `[DONE]` was

    def read(self) -> None:
        """Read what has been sent since the last time."""
        data = b"".join(self.unread)
        self.unread.clear()
        if not self.plain or not data:
            return
        text = None
        if len(data) <= AT_ONCE_BYTES:
            text = self._read_alike(data)
            if text is None:
                text = self._read_each(data)
        if text is not None:
            self._text_bytes += len(text)
            self._text.append(text)
        if text is None or self._text_bytes > TEXT_BYTES:
            self.plain = False
            self._text.clear()
            self._splitter = SseSplitter()  # it may hold much of an event

    def _read_alike(self, data: bytes) -> bytes | None:
        """The text of events that differ in nothing else; None if these do."""
        if self._alike is None or self._splitter.inside:
            return None
        before, after, created = self._alike
        if created:
            at = data.rfind(_CREATED)
            now = data[at : at + len(created)]
            if now != created:  # in no text: there the quotes are escaped
                data = data.replace(now, created)
        if not (data.startswith(before) and data.endswith(after)):
            return None
        texts = data[len(before) : -len(after)].rsplit(after + before)  # CPython's rsplit is faster than its split here
        text = _unescaped(b"".join(texts))
        if text is None or b"" in texts:  # something else stands between them, or an event without text
            return None
        blanks = 0
        for one in reversed(texts):
            if not (_unescaped(one) or "x").isspace():
                break
            blanks += 1
        self.tokens += len(texts)
        self.blanks = blanks + (self.blanks if blanks == len(texts) else 0)
        return text.encode()

    def _read_each(self, data: bytes) -> bytes | None:
        """The text, event by event; None if there is more to them than text."""
        texts: list[str] = []
        event = b""
        for event in self._splitter.feed(data):
            _, document = parse_event(event)
            if not document:
                continue
            if document.startswith(b"[DONE]"):
                self.done = True
                continue
            try:
                chunk = _chunk.decode(document)
                if self.identity is None:
                    self.identity = _owned(_identity.decode(document))
            except UNREADABLE:
                return None
            if not self._take(chunk, texts):
                return None
        if self._splitter.held_bytes > AT_ONCE_BYTES:
            return None
        self._learn(event)
        return "".join(texts).encode()

    def _learn(self, event: bytes) -> None:
        """Remember what stands around the text of an event that has nothing but text."""
        found = _TEXT.search(event)
        if found is None or not event.startswith(b"data:") or event.find(b"\n\n") != len(event) - 2:
            return
        before, after = event[: found.start(1)], event[found.end(1) :]
        try:
            chunk = _chunk.decode(parse_event(before + _MARK.encode() + after)[1])
        except UNREADABLE:
            return
        if len(chunk.choices) != 1 or chunk.choices[0].finish_reason:
            return
        choice = chunk.choices[0]
        if (choice.text if choice.delta is None else choice.delta.content) != _MARK:
            return
        at = event.rfind(_CREATED)
        end = at + len(_CREATED)
        while at >= 0 and event[end : end + 1].isdigit():
            end += 1
        self._alike = (before, after, event[at:end] if at >= 0 else b"")

    def _take(self, chunk: _Chunk, texts: list[str]) -> bool:
        """Whether `chunk` is nothing but text."""
        for choice in chunk.choices:
            text = choice.text
            delta = choice.delta
            if delta is not None:
                text = delta.content
                if delta.reasoning_content or delta.reasoning or delta.refusal:
                    return False
                if _says(delta.tool_calls) or _says(delta.function_call) or _says(delta.audio):
                    return False
            if choice.index or _says(choice.logprobs):
                return False
            if choice.finish_reason:
                self.finished = True
            if text:
                texts.append(text)
                self.tokens += 1
                self.blanks = self.blanks + 1 if text.isspace() else 0
        return True

    @property
    def text(self) -> str:
        return b"".join(self._text).decode()

    def __repr__(self) -> str:
        return f"<Spoken {self.tokens} tokens{'' if self.plain else ', not plain'}{', finished' * self.finished}>"


def to_tell(text: str) -> str:
    """What of `text` the next engine is told: no character that was only begun, and no blanks at the end."""
    return text.rstrip("\ufffd").rstrip()


def before_error(data: bytes) -> bytes:
    """The whole events in `data` up to the first that reports an error."""
    kept = []
    for event in SseSplitter().feed(data):
        name, document = parse_event(event)
        report = read(document) if b'"error"' in document else None
        if name == b"error" or (report is not None and report.error is not None):
            break
        kept.append(event)
    return b"".join(kept)


def _unescaped(text: bytes) -> str | None:
    """What a JSON string of these bytes means; None if they are none."""
    try:
        return _string.decode(b'"%b"' % text)
    except UNREADABLE:
        return None


def _says(value: Raw | UnsetType) -> bool:
    return value is not UNSET and bytes(value) not in _NOTHING


def _owned(identity: Identity) -> Identity:
    """The same with bytes of its own: a `Raw` keeps the whole document."""
    names = identity.__struct_fields__
    values = {name: getattr(identity, name) for name in names}
    return Identity(**{name: value.copy() for name, value in values.items() if value is not UNSET})
