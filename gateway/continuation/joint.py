"""Joint: the events of the stream that goes on, made into those of the stream that broke off."""

from __future__ import annotations

from typing import Any, Final

import orjson
from msgspec import UNSET, Raw
from msgspec.json import Decoder, encode

from gateway.continuation.spoken import Identity
from gateway.wire.meter import KEPT_BYTES
from gateway.wire.sse import SseSplitter, parse_event
from gateway.wire.tokens import UNREADABLE

_members = Decoder(dict[str, Raw])
_choices = Decoder(list[dict[str, Raw]])
_text = Decoder(str)

#: text this long, repeated in one event, is an echo; less may be a coincidence
_ECHO_CHARS: Final = 16
_DONE: Final = b"data: [DONE]\n\n"
_EMPTY: Final = (b"null", b'""', b"[]")


class Unfit(Exception):
    """What came cannot follow what was said: reasoning, or nothing that can be read."""


class Joint:
    """Feed it the new stream's bytes; it gives what the client gets.

    An engine that repeats what it was told before it goes on (llama.cpp without the flags) is heard from
    there on.

    `identity`: of the first stream, whose chunks these are to be. `said`: the whole text so far, `told` how much of it
    the engine was told: the blanks between are taken out where the engine writes them again. `stops`: the stop
    strings, one of which may have begun before the break. `tokens`: what `told` is taken for in tokens, part of the new
    stream's prompt and of the whole answer. `prompt`: the tokens of the first prompt, where they are known.

    Once `stopped` the answer is over, and what follows is not to be fed. Raises Unfit.
    """

    __slots__ = (
        "_held",
        "_identity",
        "_rests",
        "_seam",
        "_skip",
        "_splitter",
        "_told",
        "chat",
        "prompt",
        "stopped",
        "tokens",
    )

    def __init__(
        self,
        identity: Identity | None,
        chat: bool,
        *,
        said: str = "",
        told: str = "",
        stops: list[str] | None = None,
        tokens: int = 0,
        prompt: int | None = None,
    ) -> None:
        self._identity = {} if identity is None else _known(identity)
        self.chat = chat
        self._told = told  # until the first text
        self._skip = said[len(told) :] if said[len(told) :].isspace() else ""
        self._rests = _rests(said, stops or [])
        self._seam = ""  # new text that may be the end of a stop string
        self._held: list[bytes] = []  # its events
        self._splitter = SseSplitter()
        self.tokens = tokens
        self.prompt = prompt
        self.stopped = False

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for event in self._splitter.feed(data):
            if self.stopped:
                break
            _, document = parse_event(event)
            if not document or document.startswith(b"[DONE]"):
                out += (*self._released(), event) if document else (event,)
            else:
                self._join(document, out)
        if self._splitter.held_bytes > KEPT_BYTES:
            raise Unfit("an event without end")
        return b"".join(out)

    def finish(self) -> bytes:
        """The new stream ended cleanly: what is still held back."""
        return b"".join(self._released())

    def _released(self) -> list[bytes]:
        held, self._held, self._rests = self._held, [], []
        return held

    def _join(self, document: bytes, out: list[bytes]) -> None:
        try:
            members = _members.decode(document)
        except UNREADABLE:
            raise Unfit("an event that is no JSON object") from None
        if "error" not in members:
            members.pop("timings", None)  # of half an answer; the meter has read them
        for name, value in self._identity.items():
            if name in members:
                members[name] = value
        usage = members.get("usage")
        if usage is not None:
            members["usage"] = Raw(self._merged(bytes(usage)))
        choices = members.get("choices")
        text, says = "", False
        if choices is not None and bytes(memoryview(choices)[:2]) != b"[]":
            changed, text, says = self._choice(choices)
            if changed is not None:
                if not says:
                    return
                members["choices"] = Raw(changed)
        event = b"data: {%b}\n\n" % b",".join([b"%b:%b" % (encode(name), value) for name, value in members.items()])
        if not self._rests:
            out.append(event)
        elif text:
            self._at_seam(text, event, out)
        else:
            if says:
                out += self._released()
            (self._held if self._held else out).append(event)

    def _at_seam(self, text: str, event: bytes, out: list[bytes]) -> None:
        """A stop string may have begun before the break: its end, if this is it, is not for the client."""
        self._seam += text
        if any(self._seam.startswith(rest) for rest in self._rests):
            self.stopped = True
            self._held.clear()
            return
        self._held.append(event)
        if not any(rest.startswith(self._seam) for rest in self._rests):
            out += self._released()

    def _choice(self, choices: Raw) -> tuple[bytes | None, str, bool]:
        """The choices changed (None: as they are), their text, and whether anything is left in them."""
        try:
            found = _choices.decode(choices)
            one = found[0]
            delta = _members.decode(one["delta"]) if "delta" in one else None
            holder = one if delta is None else delta
            name = "text" if delta is None else "content"
            raw = holder.get(name)
            text = _text.decode(raw) if raw is not None and bytes(memoryview(raw)[:1]) == b'"' else ""
        except (*UNREADABLE, IndexError):
            raise Unfit("a chunk that is none") from None
        if delta is not None and any(
            name in delta and bytes(delta[name]) not in _EMPTY for name in ("reasoning_content", "reasoning")
        ):
            raise Unfit("reasoning after text")
        # where no chunk was shown before, this is the one that says who speaks
        changed = bool(self._identity) and delta is not None and delta.pop("role", None) is not None
        if self._told and text:
            told, self._told = self._told, ""
            if len(told) >= _ECHO_CHARS and text.startswith(told):
                text, changed = text[len(told) :], True
                holder[name] = Raw(orjson.dumps(text))
        if self._skip and text:
            text, changed = self._without_blanks(text), True
            holder[name] = Raw(orjson.dumps(text))
        says = bool(text) or any(bytes(value) not in _EMPTY for value in ({} if delta is None else delta).values())
        says = says or bytes(one.get("finish_reason", b"null")) != b"null"
        if not changed:
            return None, text, says
        if delta is not None:
            one["delta"] = Raw(encode(delta))
        return encode(found), text, says

    def _without_blanks(self, text: str) -> str:
        """`text` less what it repeats of the blanks that the engine was not told of."""
        common = 0
        for one, other in zip(self._skip, text, strict=False):
            if one != other:
                break
            common += 1
        self._skip = self._skip[common:] if common == len(text) else ""
        return text[common:]

    def _merged(self, usage: bytes) -> bytes:
        """The usage object of a chunk, for the whole answer."""
        try:
            counts: Any = orjson.loads(usage)
        except orjson.JSONDecodeError:
            return usage
        if not isinstance(counts, dict):
            return usage
        prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
        if type(prompt) is not int or type(completion) is not int or not prompt:
            return usage
        prompt = self.of_prompt(prompt)
        completion += self.tokens
        counts |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        details = counts.get("prompt_tokens_details")
        if isinstance(details, dict) and type(cached := details.get("cached_tokens")) is int:
            details["cached_tokens"] = min(cached, prompt)
        return orjson.dumps(counts)

    def of_prompt(self, prompt: int) -> int:
        """The first prompt's tokens, of which `prompt` is what the new stream reports: it has the text so far in it."""
        return self.prompt if self.prompt is not None else max(prompt - self.tokens, 0)


def ending(
    identity: Identity | None, chat: bool, reason: str | None, usage: tuple[int, int] | None, done: bool = True
) -> bytes:
    """The last events of an answer: the chunk with finish_reason `reason`, that with `usage` (prompt and completion
    tokens), each left out where it is None, and `[DONE]`.
    """
    known = {} if identity is None else _known(identity)
    head = b"".join([b"%b:%b," % (encode(name), value) for name, value in known.items()])
    events = []
    if reason is not None:
        choice = b'{"index":0,%b,"finish_reason":%b}' % (b'"delta":{}' if chat else b'"text":""', encode(reason))
        events.append(b'data: {%b"choices":[%b]}\n\n' % (head, choice))
    if usage is not None:
        prompt, completion = usage
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        events.append(b'data: {%b"choices":[],"usage":%b}\n\n' % (head, encode(counts)))
    return b"".join(events) + (_DONE if done else b"")


def _known(identity: Identity) -> dict[str, Raw]:
    values = {name: getattr(identity, name) for name in ("id", "object", "created", "model", "system_fingerprint")}
    return {name: value for name, value in values.items() if value is not UNSET}


def _rests(said: str, stops: list[str]) -> list[str]:
    """What of each stop string is still to come, for each length in which it may have begun at the end of `said`."""
    return [stop[at:] for stop in stops for at in range(1, len(stop)) if said.endswith(stop[:at])]
