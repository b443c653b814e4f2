"""A request's JSON body: parsed once, peeked at by type, and changed by splicing bytes.

The bytes go upstream as they came, so what we read must be what the runtime reads. Parsers differ on repeated names
(RFC 8259, section 4: the behaviour "is unpredictable"), and Go's `encoding/json`, under Ollama and LocalAI, also
matches names without regard to case, the last one winning. Such bodies are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from msgspec import DecodeError, Raw, Struct, ValidationError
from msgspec.json import Decoder, decode, encode

from gateway.errors import BadRequest

#: names whose meaning the gateway relies on: no other spelling of them may pass
GUARDED = frozenset(
    {
        "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "n",
        "options", "keep_alive", "messages", "prompt", "tools", "provider", "name", "background",
    }
)  # fmt: skip

_MEMBER = re.compile(rb'[ \t\r\n]*"([^"\\]*(?:\\.[^"\\]*)*)"[ \t\r\n]*:[ \t\r\n]*')
_NEXT = re.compile(rb"[ \t\r\n]*([,}])")
_POSITION = re.compile(r"\(byte (\d+)\)")

T = TypeVar("T")


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Options(Struct):
    num_predict: int | None = None


_object = Decoder(dict[str, Raw])
_array = Decoder(list[Raw])
_string = Decoder(str)
_integer = Decoder(int)
_stream_options = Decoder(_StreamOptions)
_options = Decoder(_Options)


class Body:
    """One JSON object. Slots only: one is made for each request, on the hot path.

    `model` is "" and `stream` None where the body has no such member.
    """

    __slots__ = ("_members", "_values", "model", "raw", "stream")

    raw: bytes
    model: str
    stream: bool | None

    def __init__(self, raw: bytes, values: dict[str, Raw]) -> None:
        self.raw = raw
        self._values = values
        #: name -> start of the name, start of the value, end of the value; made when first needed
        self._members: dict[str, tuple[int, int, int]] | None = None
        self.model = ""
        self.stream = None

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Read `raw`, which must be one JSON object in UTF-8; raises BadRequest, naming a place but no bytes."""
        if not raw.isascii():  # the decoder leaves the inside of the values unread
            _check_utf8(raw)
        body = cls(raw, _decode_object(raw))
        body._check_names()
        values = body._values
        value = values.get("model")
        if value is not None:
            model = _typed(_string, value)
            if model is None:
                raise BadRequest("'model' must be a string.", param="model", code="invalid_type")
            body.model = model
        value = values.get("stream")
        if value is not None:
            word = bytes(value)
            if word == b"true":
                body.stream = True
            elif word == b"false":
                body.stream = False
            elif word != b"null":
                raise BadRequest("'stream' must be true or false.", param="stream", code="invalid_type")
        return body

    @property
    def include_usage(self) -> bool:
        """`stream_options.include_usage` is true: the client itself asked for the usage chunk."""
        value = self._values.get("stream_options")
        if value is None:
            return False
        options = _typed(_stream_options, value)
        return options is not None and options.include_usage is True

    @property
    def max_tokens(self) -> int | None:
        """The cap on generated tokens, under whichever name it came; None where none (or no whole number) is set."""
        for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
            value = self._values.get(name)
            if value is not None:
                number = _typed(_integer, value)
                if number is not None:
                    return number
        return None

    @property
    def num_predict(self) -> int | None:
        """Ollama's cap on generated tokens, among its `options`; None where none (or no whole number) is set."""
        value = self._values.get("options")
        options = None if value is None else _typed(_options, value)
        return None if options is None else options.num_predict

    @property
    def n(self) -> int:
        """Answers asked for; 1 where `n` is absent or no whole number (the runtime judges that)."""
        value = self._values.get("n")
        number = None if value is None else _typed(_integer, value)
        return 1 if number is None else number

    def has(self, key: str) -> bool:
        return key in self._values

    def present(self, key: str) -> bool:
        """There is such a member, and it is not null."""
        value = self._values.get(key)
        return value is not None and bytes(memoryview(value)[:4]) != b"null"

    def view(self, key: str) -> memoryview | None:
        """The bytes of the value as they came, None where absent. Not copied."""
        value = self._values.get(key)
        return None if value is None else memoryview(value)

    def get(self, key: str) -> Any:
        """The decoded value, None where absent. Decoded on each call: keep it."""
        value = self._values.get(key)
        if value is None:
            return None
        try:
            return decode(value)
        except (DecodeError, RecursionError) as error:
            raise BadRequest(f"{key!r} cannot be read: it is nested too deeply.", param=key) from error

    def keys(self) -> Collection[str]:
        return self._values.keys()

    def span(self, key: str) -> tuple[int, int] | None:
        """Where in `raw` the value of `key` starts and ends; None where absent."""
        member = self._located().get(key)
        return None if member is None else member[1:]

    def patch(self, replace: Mapping[str, bytes] | None = None, remove: Collection[str] = ()) -> bytes:
        """The body with members replaced (values are JSON bytes; absent ones are appended) and others removed.

        Every other byte stays as it is. A name in both is removed.
        """
        replace = {} if replace is None else replace
        if not remove and replace and self._values and self._values.keys().isdisjoint(replace):
            return self.extended(b",".join([encode(key) + b":" + value for key, value in replace.items()]))
        members = self._located()
        raw = self.raw
        edits: list[tuple[int, int, bytes]] = []
        starts = [member[0] for member in members.values()]
        kept_one = False
        end = raw.index(b"{") + 1  # of the member before
        for i, (key, (name_at, value_at, value_end)) in enumerate(members.items()):
            if key not in remove:
                kept_one = True
                value = replace.get(key)
                if value is not None:
                    edits.append((value_at, value_end, value))
            elif kept_one:
                edits.append((end, value_end, b""))
            else:
                edits.append((name_at, starts[i + 1] if i + 1 < len(starts) else value_end, b""))
            end = value_end
        added = [
            encode(key) + b":" + value for key, value in replace.items() if key not in members and key not in remove
        ]
        if added:
            edits.append((end, end, (b"," if kept_one else b"") + b",".join(added)))
        if not edits:
            return raw
        view = memoryview(raw)
        pieces: list[bytes | memoryview] = []
        at = 0
        for start, stop, text in edits:
            pieces += (view[at:start], text)
            at = stop
        pieces.append(view[at:])
        return b"".join(pieces)

    def extended(self, members: bytes) -> bytes:
        """The body, which has members already, with further ones behind them, which it has not: no need to know where
        each begins.
        """
        raw = self.raw
        end = len(raw) - 1 if raw.endswith(b"}") else raw.rindex(b"}")
        while raw[end - 1] in b" \t\r\n":
            end -= 1
        view = memoryview(raw)
        return b"".join((view[:end], b",", members, view[end:]))

    def _check_names(self) -> None:
        values = self._values
        names = "".join(values)
        plain = names.isascii()
        if not (plain and names.islower()):
            for key in values:
                if key not in GUARDED and key.casefold() in GUARDED:
                    right = key.casefold()
                    raise BadRequest(f"A key is spelt unlike {right!r} by case only: write {right!r}.", param=right)
        compact = 1 + (len(names) if plain else len(names.encode())) + 4 * len(values)
        compact += len(b"".join(values.values())) if len(self.raw) < 16_384 else _sizes(values.values())
        # As long as its distinct members written without white space: nothing else can be in it. Otherwise look.
        if len(self.raw) != compact:
            self._located()

    def _located(self) -> dict[str, tuple[int, int, int]]:
        if self._members is None:
            self._members = self._locate()
        return self._members

    def _locate(self) -> dict[str, tuple[int, int, int]]:
        """Walk the members. The decoder keeps the first place and the last value of a repeated name, so the walk
        meets every member as decoded, and ends with the last, exactly if no name is repeated."""
        raw = self.raw
        members: dict[str, tuple[int, int, int]] = {}
        at = raw.index(b"{") + 1
        last = len(self._values)
        for i, (key, value) in enumerate(self._values.items(), 1):
            found = _MEMBER.match(raw, at)
            text = memoryview(value)
            if found is None or not raw.startswith(text, found.end()):
                raise _repeated(key)
            at = found.end() + len(text)
            members[key] = (found.start(1) - 1, found.end(), at)
            following = _NEXT.match(raw, at)
            if following is None:
                raise _repeated(key)
            if (following[1] == b"}") is not (i == last):
                again = _MEMBER.match(raw, following.end())
                raise _repeated("" if again is None else again[1].decode("utf-8", "replace"))
            at = following.end()
        return members

    def __repr__(self) -> str:
        return f"<Body {len(self.raw)} bytes, {len(self._values)} members>"


def usage_options(body: Body) -> bytes:
    """The value of `stream_options` with `include_usage` true; the client's other stream options stay as they are.

    Raises BadRequest where the client's is no object.
    """
    found = body._values.get("stream_options")
    raw = b"null" if found is None else bytes(found)
    if raw == b"null":
        return b'{"include_usage":true}'
    if not raw.startswith(b"{"):
        raise BadRequest("'stream_options' must be an object.", param="stream_options", code="invalid_type")
    options = Body(raw, _decode_object(raw))
    return options.patch({"include_usage": b"true"})


def last_object(array: bytes) -> Body | None:
    """The last element of a JSON array, if it is an object. Its names are not judged: it is the runtime's to read."""
    try:
        elements = _array.decode(array)
    except (DecodeError, RecursionError):
        return None
    if not elements or bytes(memoryview(elements[-1])[:1]) != b"{":
        return None
    raw = bytes(elements[-1])
    return Body(raw, _decode_object(raw))


def _sizes(values: Iterable[Raw]) -> int:
    return sum(len(memoryview(value)) for value in values)


def _decode_object(raw: bytes) -> dict[str, Raw]:
    try:
        return _object.decode(raw)
    except ValidationError:
        raise BadRequest("The request body must be a JSON object.", code="invalid_json") from None
    except DecodeError as error:
        raise BadRequest(_malformed(raw, str(error)), code="invalid_json") from None
    except UnicodeDecodeError:
        raise BadRequest("The request body is not valid UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.", code="invalid_json") from None


def _malformed(raw: bytes, reason: str) -> str:
    if not raw.strip(b" \t\r\n"):
        return "The request body is empty: a JSON object is expected."
    if raw.startswith(b"\xef\xbb\xbf"):
        return "The request body begins with a byte order mark: JSON is sent without one."
    position = _POSITION.search(reason)
    where = f"at byte {position[1]}" if position else "it ends too early, or with half a surrogate pair"
    if "surrogate" in reason or "hex escape" in reason:
        where += ", half of a surrogate pair"
    return f"The request body is not valid JSON ({where})."


def _check_utf8(raw: bytes) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request body is not valid UTF-8 (at byte {error.start}).", code="invalid_json") from None


def _repeated(key: str) -> BadRequest:
    named = f"The key {key!r}" if key in GUARDED else "A top-level key"
    return BadRequest(
        f"{named} appears more than once in the request body.",
        param=key if key in GUARDED else None,
        code="duplicate_key",
    )


def _typed(decoder: Decoder[T], value: Raw) -> T | None:
    try:
        return decoder.decode(value)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        return None
