"""Spoken: what an answer has said so far, read out of the bytes that went to the client, a few kilobytes at a time."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.json import Decoder

from gateway.wire.sse import SseSplitter, parse_event
from gateway.wire.tokens import UNREADABLE, read

#: relayed bytes that are kept before their text is read out of them: some forty events
UNREAD_BYTES: Final = 8 * 1024
#: of text that is kept: some 64,000 tokens. Memory is for many streams, and a client that reads slowly holds much, too.
TEXT_BYTES: Final = 256 * 1024


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
_NOTHING: Final = (b"null", b"[]", b"{}")


class Spoken:
    """Feed it with `add` what is sent, whole events; call `read` before looking at anything else.

    `tokens` counts the events with text, `blanks` those at the end whose text is nothing but white space. `plain`: so
    far it is one choice of nothing but text, not too long; once it is not, nothing is kept.
    """

    __slots__ = (
        "_splitter",
        "_text",
        "_text_bytes",
        "_unread",
        "_unread_bytes",
        "blanks",
        "done",
        "finished",
        "identity",
        "plain",
        "tokens",
    )

    def __init__(self) -> None:
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._splitter = SseSplitter()
        self._text: list[bytes] = []
        self._text_bytes = 0
        self.identity: Identity | None = None  # of the first chunk
        self.tokens = 0
        self.blanks = 0
        self.plain = True
        self.finished = False  # a finish_reason was among it
        self.done = False  # `[DONE]` was

    def add(self, data: bytes) -> None:
        self._unread.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes >= UNREAD_BYTES:
            self.read()

    def read(self) -> None:
        """Read what has been added since the last time."""
        data = b"".join(self._unread)
        self._unread.clear()
        self._unread_bytes = 0
        if not self.plain or not data:
            return
        texts: list[str] = []
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
                self.plain = False
                break
            if not self._take(chunk, texts):
                self.plain = False
                break
        text = "".join(texts).encode()
        self._text_bytes += len(text)
        if self.plain and self._text_bytes <= TEXT_BYTES:
            self._text.append(text)
        else:
            self.plain = False
            self._text.clear()

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


def given(text: str) -> str:
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


def _says(value: Raw | UnsetType) -> bool:
    return value is not UNSET and bytes(value) not in _NOTHING


def _owned(identity: Identity) -> Identity:
    """The same with bytes of its own: a `Raw` keeps the whole document."""
    names = identity.__struct_fields__
    values = {name: getattr(identity, name) for name in names}
    return Identity(**{name: value.copy() for name, value in values.items() if value is not UNSET})
