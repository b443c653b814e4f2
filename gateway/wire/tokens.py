"""What an answer says about itself in JSON: token usage, in every shape the runtimes use, and errors.

Shapes: OpenAI chat, completions and embeddings (`prompt_tokens`, `completion_tokens`, `*_tokens_details`), OpenAI
Responses (`input_tokens`, `output_tokens`, `*_tokens_details`), Anthropic Messages (`input_tokens` without what the
cache served: `cache_read_input_tokens`, `cache_creation_input_tokens`), Ollama (`prompt_eval_count`, `eval_count`).
Decoding is typed and partial: the fields named here are read, the rest of the document is skipped over.
"""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec import UNSET, DecodeError, Raw, Struct, UnsetType
from msgspec.json import Decoder

#: what a decoder may raise on a hostile document (bytes that are no UTF-8, nesting without end)
UNREADABLE = (DecodeError, UnicodeDecodeError, RecursionError)

ERROR_CHARS = 500  # of an upstream's error text that is kept
TOKENS_MAX = 10**9  # no prompt and no answer is longer

T = TypeVar("T")


class Usage:
    """Tokens of one answer. `cached` is a part of `prompt`, `reasoning` a part of `completion`.

    `estimated`: at least one of the numbers was counted or guessed by the gateway, not reported by the upstream.
    """

    __slots__ = ("cached", "completion", "estimated", "prompt", "reasoning")

    def __init__(
        self,
        prompt: int = 0,
        completion: int = 0,
        cached: int = 0,
        reasoning: int = 0,
        estimated: bool = False,
    ) -> None:
        self.prompt = prompt
        self.completion = completion
        self.cached = cached
        self.reasoning = reasoning
        self.estimated = estimated

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Usage):
            return NotImplemented
        return (
            self.prompt == other.prompt
            and self.completion == other.completion
            and self.cached == other.cached
            and self.reasoning == other.reasoning
            and self.estimated == other.estimated
        )

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        sign = " estimated" if self.estimated else ""
        return f"<Usage {self.prompt}+{self.completion} cached={self.cached} reasoning={self.reasoning}{sign}>"


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Counters(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None


class _Document(Struct):
    """The members of an answer, or of one event, that matter here; `Raw` so that no odd one spoils the others."""

    usage: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    choices: Raw | UnsetType = UNSET
    message: Raw | UnsetType = UNSET  # Anthropic `message_start`, Ollama; text in a bare error event
    response: Raw | UnsetType = UNSET  # Responses events; text in Ollama's /api/generate
    eval_count: Raw | UnsetType = UNSET
    prompt_eval_count: Raw | UnsetType = UNSET
    timings: Raw | UnsetType = UNSET


class _Timings(Struct):
    """llama.cpp's own account of an answer, in the last chunk of a stream whether usage was asked for or not."""

    prompt_n: int  # processed now, that is without `cache_n`
    predicted_n: int
    cache_n: int = 0


class _Answer(Struct):
    """The plainest unstreamed answer: a usage of the expected types, and no error."""

    usage: _Counters
    error: Raw | UnsetType = UNSET


class _Choice(Struct):
    delta: dict[str, Raw] | UnsetType = UNSET
    finish_reason: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    message: Raw | UnsetType = UNSET


class _Error(Struct):
    message: str


_counters = Decoder(_Counters, strict=False)
_anything = Decoder(strict=False)
_document = Decoder(_Document)
_answer = Decoder(_Answer)
_choices = Decoder(list[_Choice])
_timings = Decoder(_Timings)
_error = Decoder(_Error)
_text = Decoder(str)


def usage_from_json(value: bytes | memoryview) -> Usage | None:
    """Read one usage object; None if it is `null`, unreadable, or has no counter that is known.

    A member of an odd type is as good as absent; negative numbers count as zero.
    """
    try:
        counters = _counters.decode(value)
    except UNREADABLE:
        found = _lenient_counters(value)
        if found is None:
            return None
        counters = found
    return _usage(counters)


def _usage(c: _Counters) -> Usage | None:
    cache_read = c.cache_read_input_tokens or 0
    if c.prompt_tokens is not None or c.completion_tokens is not None or c.total_tokens is not None:
        if c.input_tokens is None and c.output_tokens is None:
            prompt, completion = c.prompt_tokens, c.completion_tokens or 0
            if prompt is None:
                prompt = (c.total_tokens or 0) - completion  # rerankers report the total only
            details, more = c.prompt_tokens_details, c.completion_tokens_details
        else:  # Responses: it has a total_tokens too
            prompt, completion = c.input_tokens or c.prompt_tokens or 0, c.output_tokens or 0
            details = c.input_tokens_details or c.prompt_tokens_details
            more = c.output_tokens_details or c.completion_tokens_details
        cached = (details and details.cached_tokens) or cache_read
    elif c.input_tokens is not None or c.output_tokens is not None:
        prompt, completion = c.input_tokens or 0, c.output_tokens or 0
        details, more = c.input_tokens_details, c.output_tokens_details
        cached = (details and details.cached_tokens) or cache_read
        if details is None:  # Anthropic: input_tokens leaves out what the cache took or gave
            prompt += cache_read + (c.cache_creation_input_tokens or 0)
    elif c.prompt_eval_count is not None or c.eval_count is not None:
        prompt, completion, cached, more = c.prompt_eval_count or 0, c.eval_count or 0, 0, None
    else:
        return None
    return _plausible(prompt, completion, cached, (more and more.reasoning_tokens) or 0)


def _plausible(prompt: int, completion: int, cached: int, reasoning: int) -> Usage | None:
    """None where no answer can have used so much: such a report is as good as none. Of a prompt no more than all of it
    was cached, or its cost would be less than nothing.
    """
    prompt, completion = max(prompt, 0), max(completion, 0)
    if prompt > TOKENS_MAX or completion > TOKENS_MAX:
        return None
    return Usage(prompt, completion, min(max(cached, 0), prompt), min(max(reasoning, 0), completion))


def _lenient_counters(value: bytes | memoryview) -> _Counters | None:
    """The same document without the types: each counter that is a whole number is taken, the others are left."""
    try:
        document = _anything.decode(value)
    except UNREADABLE:
        return None
    if not isinstance(document, dict):
        return None
    counters = _Counters()
    for name in _Counters.__struct_fields__:
        found = document.get(name)
        if name.endswith("_details"):
            if isinstance(found, dict):
                cached, reasoning = found.get("cached_tokens"), found.get("reasoning_tokens")
                setattr(counters, name, _Details(_whole(cached), _whole(reasoning)))
        else:
            setattr(counters, name, _whole(found))
    return counters


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


class Report:
    """What one JSON document (an unstreamed answer, or the data of one event) says."""

    __slots__ = ("error", "one_of", "trailing", "usage")

    def __init__(self, usage: Usage | None, error: str | None, trailing: bool, one_of: str = "") -> None:
        self.usage = usage
        #: llama.cpp accounts for each choice of n apart, by "usage" chunks or by "timings": to be added up
        self.one_of = one_of
        self.error = error  # at most ERROR_CHARS
        self.trailing = trailing  # a usage chunk that carries nothing else


def answer_usage(document: bytes | memoryview) -> Usage | None:
    """The usage of a plain unstreamed answer in one pass; None for anything out of the ordinary, which `read` knows."""
    try:
        found = _answer.decode(document)
    except UNREADABLE:
        return None
    if found.error is not UNSET:
        return None
    usage = _usage(found.usage)
    return usage if usage is not None and (usage.prompt or usage.completion) else None


def read(document: bytes | memoryview) -> Report | None:
    """Read a document's usage and error; None if it is no JSON object."""
    try:
        found = _document.decode(document)
    except UNREADABLE:
        return None
    usage, trailing, one_of = None, False, ""
    if found.usage is not UNSET:
        usage = usage_from_json(memoryview(found.usage))
        trailing = usage is not None and found.choices is not UNSET and _carries_nothing(found.choices)
    elif found.prompt_eval_count is not UNSET or found.eval_count is not UNSET:
        usage = usage_from_json(document)
    if found.timings is not UNSET:
        if trailing:
            one_of = "usage"
        elif usage is None and found.choices is not UNSET and _ends_a_choice(found.choices):
            timings = _decoded(_timings, found.timings)
            if timings is not None:
                one_of = "timings"
                usage = _plausible(timings.prompt_n + timings.cache_n, timings.predicted_n, timings.cache_n, 0)
    inner = found.response if found.response is not UNSET else found.message
    error = None if found.error is UNSET else _error_text(memoryview(found.error))
    if inner is not UNSET and bytes(memoryview(inner)[:1]) == b"{":
        nested = _decoded(_document, inner)
        if nested is not None:
            if usage is None and nested.usage is not UNSET:
                usage = usage_from_json(memoryview(nested.usage))
            if error is None and nested.error is not UNSET:
                error = _error_text(memoryview(nested.error))
    return Report(usage, error, trailing, one_of)


def message_text(document: bytes | memoryview) -> str:
    """The `message` of an error event that has it at the top (Responses `event: error`), else a plain word."""
    return _error_text(document) or "the upstream reported an error"


def _decoded(decoder: Decoder[T], value: bytes | memoryview | Raw) -> T | None:
    try:
        return decoder.decode(value)
    except UNREADABLE:
        return None


def _ends_a_choice(choices: Raw) -> bool:
    found = _decoded(_choices, choices) or ()
    return any(one.finish_reason is not UNSET and bytes(one.finish_reason) != b"null" for one in found)


def _carries_nothing(choices: Raw) -> bool:
    """`[]` (vLLM, llama.cpp, Ollama), or choices of an empty delta without finish_reason (LiteLLM)."""
    try:
        found = _choices.decode(choices)
    except UNREADABLE:
        return False
    for choice in found:
        if choice.finish_reason is not UNSET or choice.text is not UNSET or choice.message is not UNSET:
            return False
        if choice.delta is UNSET:
            return False
        if any(bytes(memoryview(value)) not in (b"null", b'""') for value in choice.delta.values()):
            return False
    return True


def _error_text(value: bytes | memoryview) -> str | None:
    """The text of an error member: an object with a `message`, or a string (Ollama); None for null."""
    raw = bytes(value[:8192])
    if raw == b"null":
        return None
    if raw.startswith(b'"'):
        text = _decoded(_text, value)
        return raw.decode("utf-8", "replace")[:ERROR_CHARS] if text is None else text[:ERROR_CHARS]
    error = _decoded(_error, value)
    return raw.decode("utf-8", "replace")[:ERROR_CHARS] if error is None else error.message[:ERROR_CHARS]
