"""Which requests' answers can be continued, and the body that asks for the rest of one.

Chat: the same request with the text so far as the last assistant message, to be gone on with. Completions: the prompt
followed by the text so far. What bounds the answer's length is reduced by what was already made.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from gateway.errors import BadRequest
from gateway.wire.body import Body, last_object

#: fields under which an answer is more than one run of text, or bound to a form that its rest alone does not have;
#: harmless where null or false
_BINDING: Final = frozenset(
    {
        "best_of", "echo", "function_call", "grammar", "guided_choice", "guided_decoding_backend", "guided_grammar",
        "guided_json", "guided_regex", "guided_whitespace_pattern", "include_stop_str_in_output", "json_schema",
        "logprobs", "min_tokens", "modalities", "n", "n_probs", "prompt_embeds", "prompt_logprobs", "response_format",
        "return_token_ids", "return_tokens_as_token_ids", "structured_outputs", "suffix", "timings_per_token",
        "tool_choice", "top_logprobs", "truncate_prompt_tokens", "use_beam_search",
    }
)  # fmt: skip
#: values of them that bind nothing
_LOOSE: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
#: what bounds the length of an answer, in the runtimes' own words
_LENGTHS: Final = ("max_completion_tokens", "max_tokens", "n_predict")
#: chat templates are told by these that the last message is not over
_FLAGS: Final = {"add_generation_prompt": b"false", "continue_final_message": b"true"}


def continuable(body: Body, chat: bool) -> bool:
    """Whether an answer to `body` that is plain text can be gone on with by another engine."""
    keys = body.keys()
    if not _BINDING.isdisjoint(keys) and any(_binds(body, key) for key in _BINDING.intersection(keys)):
        return False
    if chat:
        if body.has("add_generation_prompt") and body.get("add_generation_prompt") is not True:
            return body.get("continue_final_message") is True  # else the model goes on with what is no message
        return True
    span = body.span("prompt")
    return span is not None and body.raw.startswith(b'"', span[0])  # else tokens, or several prompts


def _binds(body: Body, key: str) -> bool:
    value = body.get(key)
    return not (value is None or value is False or value in _LOOSE.get(key, ()))


def stop_strings(body: Body) -> list[str]:
    stop = body.get("stop")
    return [one for one in (stop if isinstance(stop, list) else [stop]) if isinstance(one, str) and one]


class Finished(Exception):
    """The answer has the length that was asked for: nothing is left to be said."""


def for_the_rest(body: Body, chat: bool, text: str, tokens: int, *, unasked: bool, default: int | None) -> bytes | None:
    """The body that asks for what follows `text`; None if there is no way to ask.

    `tokens`: the length of `text`. `unasked`: the runtime that wrote it goes on with a final assistant message of the
    client's even where not told to, so `text` belongs to that message. `default`: the length that runtime gives an
    answer for which no other was asked. Raises Finished if no token is left.
    """
    replace = _lengths(body, tokens, default)
    if not text:
        return body.patch(replace) if replace else body.raw
    if not chat:
        span = body.span("prompt")
        assert span is not None
        prompt = body.raw[span[0] : span[1]]
        return body.patch({**replace, "prompt": prompt[:-1] + orjson.dumps(text)[1:]})
    try:
        messages = _with_text(body, text, unasked)
    except BadRequest:  # a last message that names its content twice
        return None
    return None if messages is None else body.patch({**replace, **_FLAGS, "messages": messages})


def _lengths(body: Body, tokens: int, default: int | None) -> dict[str, bytes]:
    """The bounds on the answer's length, less `tokens`."""
    bounds = {}
    for name in _LENGTHS:
        value = body.get(name)
        if type(value) is int and value > 0:
            bounds[name] = value
    if not bounds and default is not None:
        bounds["max_tokens"] = default
    if bounds and min(bounds.values()) <= tokens:
        raise Finished
    return {name: b"%d" % (value - tokens) for name, value in bounds.items()} if tokens else {}


def _with_text(body: Body, text: str, unasked: bool) -> bytes | None:
    """The value of `messages` with `text` as the last message, or at the end of it if that was the client's wish."""
    span = body.span("messages")
    assert span is not None
    messages = body.raw[span[0] : span[1]]
    last = last_object(messages)
    role = None if last is None else last.get("role")
    wished = body.get("continue_final_message") is True
    if last is None or not (wished or (unasked and role == "assistant")):
        message = b'{"role":"assistant","content":%b}' % orjson.dumps(text)
        inside = messages[:-1].rstrip()
        return inside + (b"," if inside != b"[" else b"") + message + b"]" if messages.startswith(b"[") else None
    content = last.get("content")
    if role != "assistant" or not isinstance(content, str):
        return None
    end = messages.rindex(last.raw)
    if not wished and text.startswith(content):  # unasked, llama.cpp repeats the message at the answer's beginning
        content = ""
    patched = last.patch({"content": orjson.dumps(content + text)})
    return messages[:end] + patched + messages[end + len(last.raw) :]
