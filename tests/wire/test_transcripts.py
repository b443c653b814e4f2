"""Every recorded stream of every runtime through the meters: relayed untouched, counted as the runtime counted."""

from __future__ import annotations

import pytest

from gateway.wire.usage import JsonMeter, Meter, SseMeter, Usage, new_meter
from tests.replay import TRANSCRIPTS
from tests.transcripts import RUNTIMES, load, section, streams
from tests.wire.oracle import Reading, read_json, read_ndjson, read_sse

STREAMS = streams()
PROMPT_ESTIMATE = 1000


def reading_of(runtime: str, name: str) -> Reading:
    transcript = load(runtime, name)
    sse = transcript.header(b"content-type").startswith(b"text/event-stream")
    return read_sse(transcript.body) if sse else read_ndjson(transcript.body)


def expected_body(runtime: str, name: str, strip: bool) -> bytes:
    body = load(runtime, name).body
    if strip:
        for chunk in reading_of(runtime, name).trailing:
            assert body.count(chunk) == 1
            body = body.replace(chunk, b"")
    return body


def feed(meter: Meter, pieces: list[bytes]) -> bytes:
    out = [meter.feed(piece, float(at)) for at, piece in enumerate(pieces, 1)]
    return b"".join([*out, meter.finish()])


def facts(meter: Meter) -> tuple[Usage, int, bool, str | None]:
    return meter.result(PROMPT_ESTIMATE), meter.events, meter.finished, meter.error


def check(meter: Meter, reading: Reading) -> None:
    usage = meter.result(PROMPT_ESTIMATE)
    assert meter.events == reading.content
    assert meter.finished is reading.finished
    assert (meter.error is not None) is reading.error
    if reading.usages:
        assert usage == Usage(reading.prompt, reading.completion, reading.cached, reading.reasoning)
    else:
        assert usage == Usage(PROMPT_ESTIMATE, reading.content, estimated=True)


def test_the_recordings_are_there() -> None:
    assert len(UNSTREAMED) >= 35
    assert {runtime for runtime, _ in STREAMS} == set(RUNTIMES)
    assert len(STREAMS) >= 45


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(("runtime", "name"), STREAMS)
def test_stream(runtime: str, name: str, strip: bool) -> None:
    transcript = load(runtime, name)
    kind, body = transcript.header(b"content-type"), transcript.body
    reading = reading_of(runtime, name)
    expected = expected_body(runtime, name, strip and kind.startswith(b"text/event-stream"))

    whole = new_meter(kind, strip)
    assert feed(whole, [body]) == expected
    check(whole, reading)

    bytewise = new_meter(kind, strip)
    assert feed(bytewise, [body[i : i + 1] for i in range(len(body))]) == expected
    assert facts(bytewise) == facts(whole)

    event_end = b"\n\n" if isinstance(whole, SseMeter) else b"\n"
    events = [event + event_end for event in body.split(event_end)[:-1]]
    one_by_one = new_meter(kind, strip)
    assert feed(one_by_one, events) == expected
    assert facts(one_by_one) == facts(whole)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(("runtime", "name"), STREAMS)
def test_stream_split_at_every_byte(runtime: str, name: str, strip: bool) -> None:
    transcript = load(runtime, name)
    kind, body = transcript.header(b"content-type"), transcript.body
    expected = expected_body(runtime, name, strip and kind.startswith(b"text/event-stream"))
    whole = new_meter(kind, strip)
    feed(whole, [body])
    # Long bodies repeat one event many times over: their beginning and end hold every kind of event.
    points = list(range(len(body))) if len(body) < 4000 else [*range(1200), *range(len(body) - 1800, len(body))]
    for at in points if strip else points[::7]:  # without stripping the same code runs, and returns what it got
        meter = new_meter(kind, strip)
        assert feed(meter, [body[:at], body[at:]]) == expected, at
        assert facts(meter) == facts(whole), at


@pytest.mark.parametrize(("runtime", "name"), [("vllm", "12-chat-stream-usage"), ("litellm", "12-chat-stream-usage")])
def test_end_of_a_stream_split_at_every_pair_of_bytes(runtime: str, name: str) -> None:
    body = expected_tail = load(runtime, name).body
    tail = b"\n\n".join(body.split(b"\n\n")[-4:])  # the finish chunk, the usage chunk, [DONE]
    expected_tail = tail.replace(read_sse(tail).trailing[0], b"")
    for newline in (b"\n", b"\r\n", b"\r"):
        text, expected = tail.replace(b"\n", newline), expected_tail.replace(b"\n", newline)
        for first in range(0, len(text), 5):
            for second in range(first + 1, len(text), 3):
                meter = SseMeter(strip_usage=True)
                pieces = [text[:first], text[first:second], text[second:]]
                assert feed(meter, pieces) == expected, (newline, first, second)
                assert meter.usage is not None
                assert meter.finished


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(("runtime", "name"), [s for s in STREAMS if not s[1].startswith("o")])
def test_other_line_ends_and_a_byte_order_mark(runtime: str, name: str, strip: bool, newline: bytes) -> None:
    body = b"\xef\xbb\xbf" + load(runtime, name).body.replace(b"\n", newline)
    expected = b"\xef\xbb\xbf" + expected_body(runtime, name, strip).replace(b"\n", newline)
    for pieces in (
        [body],
        [body[i : i + 1] for i in range(len(body))],
        [body[i : i + 7] for i in range(0, len(body), 7)],
    ):
        meter = SseMeter(strip)
        assert feed(meter, pieces) == expected
        check(meter, reading_of(runtime, name))


UNSTREAMED = [
    (path.parent.name, path.stem)
    for path in sorted(TRANSCRIPTS.glob("*/*.txt"))
    if path.stem
    in {
        "10-chat",
        "14-chat-logprobs",
        "20-completions",
        "30-tools-required",
        "47-prompt-too-long",
        "60-anthropic-messages",
        "63-anthropic-error",
        "65-responses",
        "73-cache-second",
        "o11-chat",
        "o13-generate",
    }
]


@pytest.mark.parametrize(("runtime", "name"), UNSTREAMED)
def test_unstreamed(runtime: str, name: str) -> None:
    transcript = load(runtime, name)
    meter = new_meter(transcript.header(b"content-type"), strip_usage=True)
    assert isinstance(meter, JsonMeter)
    body = transcript.body
    pieces = [body[i : i + 100] for i in range(0, len(body), 100)]
    assert feed(meter, pieces) == body
    if transcript.status == 200:
        reading = read_json(body)
        assert meter.result(0) == Usage(reading.prompt, reading.completion, reading.cached, reading.reasoning)
        assert meter.finished
        assert meter.error is None
    else:
        assert meter.error


PAIRS = [
    ("vllm", "10-chat", "12-chat-stream-usage"),
    ("vllm", "20-completions", "21-completions-stream"),
    ("vllm", "73-cache-second", "74-cache-second-stream"),
    ("llama-server", "10-chat", "12-chat-stream-usage"),
    ("llama-server", "20-completions", "21-completions-stream"),
    ("llama-server", "73-cache-second", "74-cache-second-stream"),
    ("ollama", "10-chat", "12-chat-stream-usage"),
    ("ollama", "20-completions", "21-completions-stream"),
    ("litellm", "10-chat", "12-chat-stream-usage"),
    ("litellm", "73-cache-second", "74-cache-second-stream"),
]


@pytest.mark.parametrize(("runtime", "unstreamed", "streamed"), PAIRS)
def test_a_streamed_answer_counts_as_the_same_answer_unstreamed(runtime: str, unstreamed: str, streamed: str) -> None:
    results = []
    for name in (unstreamed, streamed):
        transcript = load(runtime, name)
        meter = new_meter(transcript.header(b"content-type"))
        feed(meter, [transcript.body])
        results.append(meter.result(0))
    assert not results[0].estimated
    assert not results[1].estimated
    assert results[0].prompt == results[1].prompt
    assert results[0].completion == results[1].completion


# ---- failures in the middle of a stream


def test_vllm_sends_done_after_its_error() -> None:
    meter = SseMeter()
    feed(meter, [section("vllm", "95-engine-dies-mid-stream", 0)])
    assert meter.error is not None
    assert meter.error.startswith("EngineCore encountered an issue")
    assert not meter.finished


def test_litellm_reports_a_dead_upstream_inside_the_stream() -> None:
    meter = SseMeter()
    feed(meter, [section("litellm", "95-upstream-dies", 0)])
    assert meter.error is not None
    assert "APIConnectionError" in meter.error
    assert not meter.finished
    assert meter.events == 2


def test_ollama_reports_a_dead_runner_natively_and_swallows_it_in_its_openai_dialect() -> None:
    native = new_meter("application/x-ndjson")
    feed(native, [section("ollama", "95-runner-dies-mid-stream", 0)])
    assert native.error == "an error was encountered while running the model: unexpected EOF"
    assert not native.finished
    assert native.events == 3

    openai = SseMeter()
    feed(openai, [section("ollama", "95-runner-dies-mid-stream", 2)])
    assert openai.error is None
    assert openai.events == 2
    assert not openai.finished  # the only sign: no finish_reason, no [DONE]


def test_llama_server_stalls_with_a_comment() -> None:
    meter = SseMeter()
    killed, _, comment = section("llama-server", "95-process-dies", 2).rpartition(b":\n\n")
    assert killed
    assert comment == b""
    meter.feed(killed, 5.0)
    events = meter.events
    meter.feed(b":\n\n", 35.0)
    assert meter.last_content_at == 5.0
    assert meter.events == events
    assert not meter.finished
