"""The meters on shapes that no recording has: hostile, huge, odd, or from runtimes not recorded."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.meter import HELD_BACK_BYTES, KEPT_BYTES
from gateway.wire.usage import (
    JsonMeter,
    NdjsonMeter,
    SseMeter,
    Usage,
    new_meter,
)

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def sse(document: Any, spaced: bool = False) -> bytes:
    separators = None if spaced else (",", ":")
    return b"data: " + json.dumps(document, separators=separators, ensure_ascii=False).encode() + b"\n\n"


def chat(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


TRAILING = sse({"id": "x", "choices": [], "usage": USAGE})
FAILED = {"type": "response.failed", "response": {"status": "failed", "error": {"message": "boom"}}}
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize(
    ("delta", "counts"),
    [
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant", "content": None}, False),
        ({"role": "assistant"}, False),
        ({}, False),
        ({"content": "a"}, True),
        ({"content": '"content":""'}, True),
        ({"content": '"finish_reason":"stop","usage":{}'}, True),
        ({"role": "assistant", "content": "The"}, True),
        ({"content": None, "reasoning_content": "hm"}, True),
        ({"content": "", "reasoning": "hm"}, True),
        ({"content": None, "reasoning_content": None}, False),
        ({"content": None, "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}, True),
        ({"content": None, "tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, True),
        ({"content": None, "tool_calls": []}, False),
        ({"function_call": {"name": "f", "arguments": ""}}, True),
    ],
)
def test_what_counts_as_content(delta: dict[str, Any], counts: bool, spaced: bool) -> None:
    event = sse(chat(delta), spaced)
    fresh = SseMeter()
    fresh.feed(event, 1.0)
    assert fresh.events == counts
    assert not fresh.finished
    assert fresh.usage is None
    taught = SseMeter()  # the short look, learnt from another event, must see the same
    taught.feed(sse(chat({"content": "x"}), spaced), 1.0)
    taught.feed(event, 2.0)
    assert taught.events == 1 + counts
    assert not taught.finished
    assert taught.usage is None
    assert (taught.first_content_at, taught.last_content_at) == (1.0, 2.0 if counts else 1.0)


def test_two_choices_in_one_event_are_one_event() -> None:
    meter = SseMeter()
    both = {"choices": [{"delta": {"content": "a"}}, {"delta": {"content": ""}}]}
    meter.feed(sse(both), 1.0)
    meter.feed(sse(both), 1.0)
    meter.feed(sse({"choices": both["choices"][::-1]}), 1.0)
    assert meter.events == 3


def test_finish_with_content_and_usage_in_one_event() -> None:
    meter = SseMeter(strip_usage=True)
    first, last = sse(chat({"content": "a"})), sse(chat({"content": "b"}, "length", usage=USAGE))
    assert meter.feed(first, 1.0) is first
    assert meter.feed(last, 2.0) is last  # the usage rides on content: nothing is removed
    assert (meter.events, meter.finished, meter.usage) == (2, True, Usage(7, 3))


@pytest.mark.parametrize(
    "kept",
    [
        {"choices": [], "usage": None},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "usage": USAGE},
        {"choices": [{"index": 0, "text": ""}], "usage": USAGE},
        {"choices": [{"index": 0, "delta": {}}, {"index": 1, "delta": {"content": "x"}}], "usage": USAGE},
        {"choices": [], "prompt_filter_results": []},
        {"usage": USAGE},
        {"choices": [], "usage": "none"},
        {"choices": [], "error": {"message": "usage"}},
    ],
)
def test_what_is_never_removed(kept: dict[str, Any]) -> None:
    event = sse(kept)
    assert SseMeter(strip_usage=True).feed(event, 1.0) == event
    assert SseMeter(strip_usage=True).feed(b": ping\n" + event + DONE, 1.0) == b": ping\n" + event + DONE


def test_the_trailing_usage_chunk_goes_and_no_other_byte() -> None:
    stream = sse(chat({"content": "a"})) + sse(chat({}, "stop")) + TRAILING + DONE
    for size in (1, 2, 3, 5, 50, len(stream)):
        meter = SseMeter(strip_usage=True)
        out = [meter.feed(stream[i : i + size], 1.0) for i in range(0, len(stream), size)]
        assert b"".join([*out, meter.finish()]) == stream.replace(TRAILING, b"")
        assert meter.usage == Usage(7, 3)


def test_events_are_not_held_longer_than_their_own_end() -> None:
    meter = SseMeter(strip_usage=True)
    event = sse(chat({"content": "a"}))
    assert meter.feed(event[:-1], 1.0) == b""
    assert meter.feed(event[-1:] + event[:9], 1.0) == event
    assert meter.feed(event[9:], 1.0) == event
    for newline in (b"\r", b"\r\n"):
        other = event.replace(b"\n", newline)
        meter = SseMeter(strip_usage=True)
        assert meter.feed(other, 1.0) == other
        assert meter.feed(other, 1.0) == other


def test_an_unfinished_event_at_the_end_is_counted_and_given() -> None:
    meter = SseMeter(strip_usage=True)
    assert meter.feed(b'data: {"choices":[{"delta":{"content":"a"}}]}\n', 1.0) == b""
    assert meter.finish() == b'data: {"choices":[{"delta":{"content":"a"}}]}\n'
    assert meter.events == 1
    meter = SseMeter(strip_usage=True)
    assert meter.feed(TRAILING[:-1], 1.0) + meter.finish() == b""
    assert meter.usage == Usage(7, 3)


def test_a_comment_does_not_move_the_stall_mark() -> None:
    meter = SseMeter()
    meter.feed(sse(chat({"content": "a"})), 1.0)
    for comment in (b":\n\n", b": OPENROUTER PROCESSING\n\n", b':{"delta":{"content":"x"}}\n\n', b"\n\n", b"id: 4\n\n"):
        assert meter.feed(comment, 9.0) == comment
    assert (meter.events, meter.last_content_at) == (1, 1.0)


@pytest.mark.parametrize("strip", [False, True])
def test_a_line_of_five_mebibytes(strip: bool) -> None:
    event = sse(chat({"content": "ä" * (5 * 512 * 1024)}))
    stream = event + sse(chat({}, "stop")) + TRAILING + DONE
    meter = SseMeter(strip)
    out, most = [], 0
    sent = 0
    for at in range(0, len(stream), 65_000):
        piece = stream[at : at + 65_000]
        sent += len(piece)
        out.append(meter.feed(piece, 1.0))
        most = max(most, sent - sum(map(len, out)))
    out.append(meter.finish())
    assert b"".join(out) == (stream.replace(TRAILING, b"") if strip else stream)
    assert most <= HELD_BACK_BYTES + len(TRAILING)
    assert (meter.events, meter.finished, meter.usage) == (1, True, Usage(7, 3))


def test_an_endless_event_that_never_ends_passes() -> None:
    meter = SseMeter(strip_usage=True)
    pieces = [b"data: "] + [b"a" * 1_000_000] * 9 + [b"a" * 100]
    out = [meter.feed(piece, 1.0) for piece in pieces]
    assert b"".join([*out, meter.finish()]) == b"".join(pieces)


@pytest.mark.parametrize("strip", [False, True])
def test_an_event_beyond_what_is_kept_is_counted_unread(strip: bool) -> None:
    event = sse(chat({"content": "a" * (KEPT_BYTES + 200_000)}))
    stream = event + TRAILING + DONE
    meter = SseMeter(strip)
    out = [meter.feed(stream[i : i + 100_000], 1.0) for i in range(0, len(stream), 100_000)]
    assert b"".join([*out, meter.finish()]) == (event + DONE if strip else stream)
    assert (meter.events, meter.usage) == (1, Usage(7, 3))


def test_one_byte_reads_take_linear_time() -> None:
    def seconds(size: int) -> float:
        event = sse(chat({"content": "a" * size}))
        meter = SseMeter(strip_usage=True)
        start = time.perf_counter()
        for i in range(len(event)):
            meter.feed(event[i : i + 1], 1.0)
        assert meter.events == 1
        return time.perf_counter() - start

    small, large = min(seconds(8_000) for _ in range(3)), seconds(128_000)
    assert large < 16 * small * 4  # 16 times the bytes; quadratic would be 256 times the time


@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.booleans(), st.data())
@settings(max_examples=120, deadline=None)
def test_any_split_of_any_stream(cuts: list[int], newline: bytes, strip: bool, data: st.DataObject) -> None:
    parts = [
        sse(chat({"content": "a"})), sse(chat({"content": "ä\n"}), True), sse(chat({"role": "assistant"})),
        sse(chat({"content": "b"}, "stop")), b": ping\n\n", b"\n", b"event: x\ndata: 1\ndata: 2\n\n",
        TRAILING, DONE,
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(parts), max_size=12))
    stream = b"".join(chosen).replace(b"\n", newline)
    whole = SseMeter(strip)
    expected = whole.feed(stream, 1.0) + whole.finish()
    meter, out, at = SseMeter(strip), [], 0
    for cut in [*cuts, len(stream)]:
        out.append(meter.feed(stream[at : at + cut], 1.0))
        at += cut
    out.append(meter.finish())
    assert b"".join(out) == expected
    assert (meter.usage, meter.events, meter.finished) == (whole.usage, whole.events, whole.finished)
    if not strip:
        assert expected == stream
    else:  # what stays is the stream without the chunk (a bare line end before it counts as its own)
        lone = [part for part in chosen if part != TRAILING]
        assert expected.strip(b"\r\n").replace(newline, b"") == b"".join(lone).replace(b"\n", b"")


_WORDS = [
    "a",
    " b",
    "ä",
    'a "quote"',
    "back\\",
    '\\"',
    '"},"finish_reason":"stop","x":{"',
    "\n\n",
    "[DONE]",
    '"usage":{}',
]
_ENDS: list[dict[str, Any]] = [
    chat({"content": "end"}, "stop"), chat({}, "stop"), chat({"content": "c"}, usage=USAGE), chat({"content": ""}),
    chat({"content": "d"}, created=2), {"id": "x", "choices": [], "usage": USAGE}, {"error": {"message": "boom"}},
]  # fmt: skip


@given(
    st.lists(st.sampled_from(_WORDS), min_size=1, max_size=12),
    st.lists(st.one_of(st.sampled_from(_ENDS), st.sampled_from(_WORDS)), max_size=8),
    st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_events_like_the_one_before_are_read_as_if_each_were_the_first(
    words: list[str], more: list[Any], at_once: int
) -> None:
    events = [sse(chat({"content": one}) if isinstance(one, str) else one) for one in [*words, *more]]
    meter = SseMeter(strip_usage=True)
    out = b""
    for at in range(0, len(events), at_once):
        out += meter.feed(b"".join(events[at : at + at_once]), 1.0)
    alone = []
    for event in events:  # read by a meter that has learnt nothing
        alone.append(SseMeter(strip_usage=True))
        alone[-1].feed(event, 1.0)
    assert out == b"".join(event for event in events if event != TRAILING)
    assert meter.events == sum(one.events for one in alone)
    assert (meter.usage is None) is all(one.usage is None for one in alone)
    assert meter.error == next((one.error for one in alone if one.error), None)
    assert meter.finished is (meter.error is None and any(one.finished for one in alone))


@given(st.lists(st.binary(max_size=60), max_size=12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes_pass_untouched(pieces: list[bytes], strip: bool) -> None:
    for meter in (SseMeter(strip), NdjsonMeter(), JsonMeter()):
        out = [meter.feed(piece, 1.0) for piece in pieces]
        assert b"".join([*out, meter.finish()]) == b"".join(pieces)
        meter.result(5)


def test_whole_events_are_returned_as_the_very_same_object() -> None:
    event = sse(chat({"content": "a"}))
    for piece in (event, event + event, TRAILING + DONE, event.replace(b"\n", b"\r\n"), b": x\r\r", b""):
        assert (meter := SseMeter()).feed(piece, 1.0) is piece, meter
    for piece in (event + event, event.replace(b"\n", b"\r"), DONE):
        assert (meter := SseMeter(strip_usage=True)).feed(piece, 1.0) == piece, meter
    line = b'{"message":{"content":"a"},"done":false}\n'
    for piece in (line, line + line, line * 2 + b"\r\n", b"\n", b""):
        assert (meter2 := NdjsonMeter()).feed(piece, 1.0) is piece, meter2


@pytest.mark.parametrize("strip", [False, True])
def test_what_is_returned_ends_with_an_event(strip: bool) -> None:
    """So that an error event may follow at any time."""
    event = sse(chat({"content": "ä"}))
    stream = event * 3
    for size in (1, 2, 3, len(event) - 1, len(event) + 1, len(event) + 10):
        meter, out = SseMeter(strip), b""
        for i in range(0, len(stream), size):
            out += meter.feed(stream[i : i + size], 1.0)
            assert out == event * (min(i + size, len(stream)) // len(event))
            assert not meter.torn


def test_what_is_returned_ends_with_a_line() -> None:
    line = b'{"message":{"content":"a"},"done":false}\n'
    for size in (1, 2, 7, len(line) + 1):
        meter, out = NdjsonMeter(), b""
        for i in range(0, len(line) * 3, size):
            out += meter.feed((line * 3)[i : i + size], 1.0)
            assert out == line * (min(i + size, len(line) * 3) // len(line))
            assert not meter.torn


@pytest.mark.parametrize("meter", [SseMeter(), SseMeter(True), NdjsonMeter()], ids=["sse", "strip", "ndjson"])
def test_a_long_event_is_passed_on_torn(meter: SseMeter | NdjsonMeter) -> None:
    assert meter.feed(b"data: " + b"x" * 100, 1.0) == b""
    assert not meter.torn
    assert len(meter.feed(b"x" * HELD_BACK_BYTES, 1.0)) == HELD_BACK_BYTES + 106
    assert meter.torn
    assert meter.feed(b"x", 1.0) == b"x"
    assert meter.feed(b"\n\n", 1.0) == b"\n\n"
    assert not meter.torn
    meter.feed(b"x" * (KEPT_BYTES + 1), 1.0)
    assert meter.torn


# ---- usage over a stream


def test_zeros_and_nulls_never_replace_a_usage() -> None:
    meter = SseMeter()
    meter.feed(sse(chat({"content": "a"}, usage=USAGE)), 1.0)
    meter.feed(sse(chat({"content": "b"}, usage={"prompt_tokens": 0, "completion_tokens": 0})), 1.0)
    meter.feed(sse(chat({"content": "b"}, usage=None)), 1.0)
    meter.feed(sse({"choices": [], "usage": None}), 1.0)
    meter.feed(DONE, 1.0)
    assert meter.result(0) == Usage(7, 3)


def test_a_cut_stream_is_counted_as_far_as_it_came() -> None:
    meter = SseMeter()
    for _ in range(5):
        meter.feed(sse(chat({"content": "a"})), 1.0)
    assert meter.result(11) == Usage(11, 5, estimated=True)
    # Anthropic told the prompt before the cut
    meter = SseMeter()
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 4, "cache_read_input_tokens": 6}}}
    meter.feed(b"event: message_start\n" + sse(start), 1.0)
    for _ in range(3):
        delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x"}}
        meter.feed(b"event: content_block_delta\n" + sse(delta), 1.0)
    assert meter.result(99) == Usage(10, 3, cached=6, estimated=True)


def test_a_finished_stream_is_trusted_over_the_count() -> None:
    meter = SseMeter()
    for _ in range(5):
        meter.feed(sse(chat({"content": "a"})), 1.0)
    meter.feed(sse(chat({}, "stop")) + TRAILING + DONE, 1.0)
    assert meter.result(0) == Usage(7, 3)


def test_generated_from_no_prompt_means_the_prompt_was_not_told() -> None:
    meter = NdjsonMeter()
    meter.feed(b'{"response":"a","done":false}\n{"response":"","done":true,"eval_count":4}\n', 1.0)
    assert meter.result(21) == Usage(21, 4, estimated=True)


# ---- errors inside a 200


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (sse({"error": {"message": "boom", "code": 500}}), "boom"),
        (sse({"error": {"message": "boom"}}, True), "boom"),
        (sse({"error": "boom"}), "boom"),
        (b"event: error\n" + sse({"type": "error", "error": {"type": "overloaded_error", "message": "boom"}}), "boom"),
        (b"event: error\n" + sse({"type": "error", "code": "x", "message": "boom"}), "boom"),
        (b"event: response.failed\n" + sse(FAILED), "boom"),
        (sse(FAILED), "boom"),
        (b"event: error\ndata: out of memory\n\n", "out of memory"),
        (b"event: error\ndata: null\n\n", "the upstream reported an error"),
        (sse({"error": {"code": 7}}), '{"code":7}'),
        (sse({"error": {"message": "x" * 2000}}), "x" * 500),
    ],
)  # fmt: skip
def test_errors(event: bytes, text: str) -> None:
    meter = SseMeter()
    meter.feed(sse(chat({"content": "a"})), 1.0)
    meter.feed(event, 1.0)
    assert meter.error == text
    assert not meter.finished
    meter.feed(DONE, 2.0)
    assert meter.error == text
    assert not meter.finished


def test_a_null_error_is_none() -> None:
    meter = SseMeter()
    meter.feed(sse(chat({}, "stop", error=None)), 1.0)
    assert meter.error is None
    assert meter.finished


# ---- NDJSON, and unstreamed JSON


def test_ndjson_splits_and_long_lines() -> None:
    lines = (
        b"".join(
            json.dumps({"message": {"role": "assistant", "content": text}, "done": False}).encode() + b"\r\n"
            for text in ("a", "", "b" * 300_000, "ä\r")
        )
        + b'{"done": true, "prompt_eval_count": 5, "eval_count": 3, "message": {"content": ""}}'
    )
    for size in (1, 7, 1000, len(lines)):
        meter = NdjsonMeter()
        pieces = [lines[i : i + size] for i in range(0, len(lines), size)] if size > 1 else [lines]
        assert b"".join([*(meter.feed(piece, 1.0) for piece in pieces), meter.finish()]) == lines
        assert (meter.events, meter.finished, meter.result(0)) == (3, True, Usage(5, 3))


def test_ndjson_tool_calls_and_thinking() -> None:
    meter = NdjsonMeter()
    meter.feed(b'{"message":{"content":"","thinking":"hm"},"done":false}\n', 1.0)
    meter.feed(
        b'{"message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{}}}]},"done":false}\n', 1.0
    )
    assert meter.events == 2


def test_json_without_usage_is_estimated_from_its_text() -> None:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": "a" * 40}}]}).encode()
    meter = JsonMeter()
    meter.feed(body, 1.0)
    meter.finish()
    assert meter.result(9) == Usage(9, 10, estimated=True)
    cut = JsonMeter()  # never finished: what was relayed counts
    cut.feed(body[: body.index(b"aaaa") + 20], 1.0)
    assert cut.result(9) == Usage(9, 5, estimated=True)
    assert not cut.finished


def test_json_beyond_what_is_kept_and_what_is_no_json() -> None:
    meter = JsonMeter()
    piece = b'{"data":["' + b"0" * 1_000_000
    for _ in range(9):
        assert meter.feed(piece, 1.0) is piece
    assert meter.finish() == b""
    assert meter.finished
    assert meter.result(3) == Usage(3, 0, estimated=True)
    audio = JsonMeter()
    audio.feed(b"RIFF" + bytes(100), 1.0)
    audio.finish()
    assert audio.result(3) == Usage(3, 0, estimated=True)


def test_embeddings() -> None:
    meter = new_meter("application/json; charset=utf-8")
    meter.feed(b'{"object":"list","usage":{"prompt_tokens":2,"total_tokens":2},"data":[{"embedding":[-0.01]}]}', 1.0)
    meter.finish()
    assert meter.result(50) == Usage(2, 0)


def test_the_meter_is_chosen_by_content_type() -> None:
    assert isinstance(new_meter("text/event-stream"), SseMeter)
    assert isinstance(new_meter(b"Text/Event-Stream; charset=utf-8", True), SseMeter)
    assert isinstance(new_meter("application/x-ndjson"), NdjsonMeter)
    assert isinstance(new_meter("application/json"), JsonMeter)
    assert isinstance(new_meter(""), JsonMeter)
    assert repr(new_meter("text/event-stream")) == "<SseMeter events=0 None open>"


def choice_end(index: int, predicted: int, cached: int = 0) -> bytes:
    """llama.cpp's last chunk of one choice."""
    timings = {"cache_n": cached, "prompt_n": 37 - cached, "predicted_n": predicted, "predicted_ms": 1.5}
    return sse({"choices": [{"finish_reason": "stop", "index": index, "delta": {}}], "timings": timings})


def test_each_choice_of_llama_cpp_is_billed_and_the_prompt_once() -> None:
    meter = SseMeter()
    meter.feed(choice_end(1, 6) + choice_end(0, 5, cached=36) + DONE, 1.0)
    assert meter.result(0) == Usage(37, 11, 0)

    asked = SseMeter()
    for completion in (6, 5):
        usage = {"prompt_tokens": 37, "completion_tokens": completion, "total_tokens": 37 + completion}
        asked.feed(sse({"choices": [], "usage": usage, "timings": {"prompt_n": 37, "predicted_n": completion}}), 1.0)
    assert asked.result(0) == Usage(37, 11, 0)


def test_timings_on_the_way_are_no_account() -> None:
    """`timings_per_token` puts running counts on every chunk."""
    meter = SseMeter()
    for count in range(1, 4):
        running = {"prompt_n": 37, "predicted_n": count}
        choice = {"index": 0, "delta": {"content": " a"}, "finish_reason": None}
        meter.feed(sse({"choices": [choice], "timings": running}), 1.0)
    meter.feed(choice_end(0, 3) + DONE, 1.0)
    assert meter.result(0) == Usage(37, 3)
