"""The bytes that pass through a contestant: what is asked, and exactly what must come back.

Shapes follow vLLM's OpenAI-compatible server (chat.completion and chat.completion.chunk). Everything is
constant, so the mock can send precomputed bytes and the load generator can compare bytes with one memcmp.
"""

import json
import re

MODEL = "mock"
KEY = "sk-bench-4f1d0c2b7a9e4d5f8b6a1c3e5d7f9a0b"
PATH = "/v1/chat/completions"
_ID = "chatcmpl-0123456789abcdef0123456789abcdef"
_CREATED = 1_760_000_000
_PROMPT_TOKENS = 256
_TEXT = "The quick brown fox jumps over the lazy dog. "
_SPEC = re.compile(rb'"user"\s*:\s*"mock-(\d+)x(\d+)"')
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_INCLUDE_USAGE = re.compile(rb'"include_usage"\s*:\s*true')


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _usage(completion_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": _PROMPT_TOKENS,
        "total_tokens": _PROMPT_TOKENS + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }


def completion() -> bytes:
    """The body of an answer that is not streamed, about 800 bytes."""
    message: dict[str, object] = {
        "role": "assistant",
        "content": _TEXT * 8,
        "refusal": None,
        "tool_calls": [],
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return _compact(
        {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": MODEL,
            "choices": [choice],
            "system_fingerprint": None,
            "usage": _usage(80),
        }
    )


def models() -> bytes:
    """The body of `GET /v1/models`."""
    model = {"id": MODEL, "object": "model", "created": _CREATED, "owned_by": "vllm", "max_model_len": 131072}
    return _compact({"object": "list", "data": [model]})


def _event(choices: list[object], **more: object) -> bytes:
    chunk = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": MODEL,
        "choices": choices,
    }
    return b"data: " + _compact(chunk | more) + b"\n\n"


def events(tokens: int, *, usage: bool = False) -> list[bytes]:
    """The SSE events of one stream: role, `tokens` numbered ones of about 220 bytes, [usage,] `[DONE]`."""
    choice: dict[str, object] = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
    out = [_event([choice | {"delta": {"role": "assistant", "content": ""}}])]
    for i in range(tokens):
        end = {"finish_reason": "stop", "stop_reason": None} if i == tokens - 1 else {}
        out.append(_event([choice | {"delta": {"content": f" tok{i:05d}"}} | end]))
    if usage:
        out.append(_event([], usage=_usage(tokens)))
    out.append(b"data: [DONE]\n\n")
    return out


def request(prompt_bytes: int, *, tokens: int = 100, interval_ms: int = 0, stream: bool = False) -> bytes:
    """A chat completion body; the mock obeys its `"user":"mock-<tokens>x<interval_ms>"`."""
    prompt = (_TEXT * (prompt_bytes // len(_TEXT) + 1))[:prompt_bytes]
    return _compact(
        {
            "model": MODEL,
            "user": f"mock-{tokens}x{interval_ms}",
            "stream": stream,
            "messages": [{"role": "user", "content": prompt}],
        }
    )


def asked(body: bytes) -> tuple[bool, bool, int, int] | None:
    """What a body asks the mock for: (stream, include_usage, tokens, interval_ms); None if for nothing.

    Only the first and the last 1,024 bytes are searched: the fields stand before the prompt, and a proxy
    that adds one adds it at an end. A megabyte is not scanned, so the mock stays cheap.
    """
    ends = body if len(body) <= 2048 else body[:1024] + body[-1024:]
    spec = _SPEC.search(ends)
    if spec is None:
        return None
    stream = _STREAM.search(ends) is not None
    return stream, stream and _INCLUDE_USAGE.search(ends) is not None, int(spec[1]), int(spec[2])
