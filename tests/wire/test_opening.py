"""When a stream has begun, by what engines say before they say anything."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.wire.opening import EVENTS_MAX, fault, opening


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    document = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


ROLE = chunk({"role": "assistant", "content": ""})
TEXT = chunk({"content": "Hi"})

BEFORE = {
    "nothing": b"",
    "a comment": b": ping\n\n:\n\n",
    "a role": ROLE,
    "a role alone": chunk({"role": "assistant"}),
    "null": chunk({"role": "assistant", "content": None}),
    "an empty delta": chunk({}),
    "no choices": chunk({}, choices=[]),
    "half of the first": ROLE + TEXT[:-1],
    "an Anthropic start": b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","content_block":{"type":"text","text":""}}\n\n',
    "a Responses start": b'data: {"type":"response.created","response":{"status":"in_progress","output":[]}}\n\n',
    "a Responses start that repeats the request": b'data: {"response":{"error":null,"instructions":"Be brief"},'
    b'"type":"response.created"}\n\ndata: {"response":{"error":null},"type":"response.in_progress"}\n\n'
    b'data: {"type":"response.content_part.added","part":{"type":"output_text","text":""}}\n\n',
}
BEGUN = {
    "text": TEXT,
    "text after a role": ROLE + TEXT,
    "reasoning": chunk({"reasoning_content": "So"}),
    "a completion's text": b'data: {"choices":[{"index":0,"text":"Hi","finish_reason":null}]}\n\n',
    "a tool call": chunk({"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}]}),
    "a finish without text": ROLE + chunk({}, "stop"),
    "done": ROLE + b"data: [DONE]\n\n",
    "Anthropic's delta": b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n',
    "Anthropic's end": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "a delta of Responses": b'data: {"type":"response.output_text.delta","delta":"Hi"}\n\n',
    "a failure of Responses": b'data: {"type":"response.failed","response":{"error":{"message":"x"}}}\n\n',
    "no JSON at all": b"data: hello\n\n",
    "an error": ROLE + b'data: {"error":{"message":"EngineDeadError","code":500}}\n\n',
    "a dialect that nobody knows": b'data: {"progress":1}\n\n' * EVENTS_MAX,
}


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_not_begun(name: str, end: bytes) -> None:
    assert opening(BEFORE[name].replace(b"\n", end), lines=False) is None


@pytest.mark.parametrize("name", BEGUN)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_begun_with_the_last_byte_and_not_before(name: str, end: bytes) -> None:
    data = BEGUN[name].replace(b"\n", end)
    assert opening(data, lines=False)
    last = len(data) - 2 if end == b"\r\n" else len(data) - 1  # CR LF CR ends an event, too
    assert opening(data[:last], lines=False) is None


def test_lines() -> None:
    assert opening(b'{"message":{"role":"assistant","content":""},"done":false}\n', lines=True) is None
    assert opening(b'{"message":{"role":"assistant","content":"Hi"},"done":false}', lines=True) is None
    for line in (b'{"message":{"content":"Hi"},"done":false}', b'{"done":true}', b'{"error":"no runner"}'):
        assert opening(line + b"\n", lines=True) == line


def test_the_last_event_needs_no_end_once_the_stream_has_ended() -> None:
    assert opening(ROLE + TEXT[:-2], lines=False) is None
    assert opening(ROLE + TEXT[:-2], lines=False, ended=True)
    assert opening(ROLE, lines=False, ended=True) is None


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b'{"error":{"message":"EngineDeadError","type":"InternalServerError","code":500}}', "EngineDeadError"),
        (b'{"error":{"message":"busy","code":429}}', "busy"),
        (b'{"error":{"message":"odd"}}', "odd"),
        (b'{"error":"llama runner process has terminated"}', "llama runner process has terminated"),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', "Overloaded"),
        (b'{"type":"error","error":{"type":"invalid_request_error","message":"too long"}}', None),
        (b'{"type":"response.failed","response":{"error":{"code":"server_error","message":"no memory"}}}', "no memory"),
        (b'{"type":"error","code":"server_error","message":"no memory","sequence_number":3}', "no memory"),
        (b'{"error":{"message":"the context is too long","code":400}}', None),
        (b'{"error":{"message":"the context is too long","code":"422"}}', None),
        (b'{"error":null,"choices":[]}', None),
        (b'{"choices":[{"delta":{"content":"\\"error\\": 1"}}]}', None),
        (b'{"choices":[{"delta":{"content":""}}],"error":{"message":"beside a choice"}}', None),
        (b'{"error', None),
        (b"[DONE]", None),
    ],
)
def test_whose_fault(said: bytes, text: str | None) -> None:
    assert fault(said) == text
