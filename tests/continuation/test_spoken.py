"""The text read out of relayed bytes, on recorded streams and on awkward ones."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gateway.continuation.spoken import AT_ONCE_BYTES, TEXT_BYTES, Spoken, before_error, to_tell
from tests import transcripts


def chunk(delta: dict[str, Any] | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": None, **more}
    return b"data: " + json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode() + b"\n\n"


def spoken(*pieces: bytes) -> Spoken:
    found = Spoken()
    for piece in pieces:
        found.unread.append(piece)
    found.read()
    return found


def text_of(body: bytes) -> str:
    """The plain way: every event parsed."""
    lines = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in line.get("choices", ())]
    return "".join([choice.get("delta", choice).get("content") or choice.get("text") or "" for choice in choices])


PLAIN = [
    (runtime, name)
    for runtime, name in transcripts.streams()
    if name in ("11-chat-stream", "12-chat-stream-usage", "13-chat-stream-continuous-usage", "21-completions-stream",
                "75-continue-final-message-stream")
]  # fmt: skip


@pytest.mark.parametrize(("runtime", "name"), PLAIN)
def test_recorded_streams(runtime: str, name: str) -> None:
    body = transcripts.load(runtime, name).body
    found = spoken(body)
    assert found.text == text_of(body)
    assert (found.plain, found.finished, found.done) == (True, True, True)
    assert found.identity is not None
    first = json.loads(body.split(b"\n\n")[0].partition(b"data: ")[2])
    assert json.loads(bytes(found.identity.id)) == first["id"]  # type: ignore[arg-type]


def test_at_least_these_runtimes_were_recorded() -> None:
    assert {runtime for runtime, _ in PLAIN} >= {"vllm", "llama-server", "ollama", "litellm"}


@pytest.mark.parametrize("seed", range(20))
def test_in_any_pieces(seed: int) -> None:
    body = transcripts.load("llama-server", "11-chat-stream").body
    chance = random.Random(seed)
    pieces = []
    at = 0
    while at < len(body):
        end = at + chance.randrange(1, 400)
        pieces.append(body[at:end])
        at = end
    found = spoken(*pieces)
    assert (found.text, found.tokens) == (text_of(body), spoken(body).tokens)


def kinds(n: int) -> bytes:
    """The n-th event of a stream with every kind of text, as llama.cpp writes it: `created` moves on."""
    text = [" word", "é", "\\n", '"', " \U0001f600", "\n\n", "\t", "\\", "}]"][n % 9]
    ensure = n % 2 == 0
    choice = {"finish_reason": None, "index": 0, "delta": {"content": text}}
    document = {"choices": [choice], "created": 1795409045 + n // 50, "id": "chatcmpl-1"}
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=ensure).encode() + b"\n\n"


def test_long_answers_are_read_many_events_at_a_time() -> None:
    events = [kinds(n) for n in range(2000)]
    found = Spoken()
    each = 0
    for at in range(0, 2000, 40):
        found.unread += events[at : at + 40]
        alike = found._alike is not None
        found.read()
        each += not alike
    assert (found.plain, found.tokens) == (True, 2000)
    assert found.text == text_of(b"".join(events))
    assert each == 1, "only the first of them event by event"
    assert found.blanks == 0
    found.unread += [kinds(2), kinds(5)]
    found.unread[0] = kinds(5)
    found.read()
    assert found.blanks == 2


@pytest.mark.parametrize("odd", [chunk({"content": "x"}, index=1), chunk({"reasoning": "x"}), b": comment\n\n"])
def test_one_that_is_not_alike_is_seen_among_them(odd: bytes) -> None:
    found = spoken(*[kinds(0)] * 40)
    assert found._alike is not None
    found.unread += [*[kinds(0)] * 20, odd, *[kinds(0)] * 20]
    found.read()
    assert (found.plain, found.tokens) == ((True, 80) if odd.startswith(b":") else (False, 60))


@pytest.mark.parametrize(
    "event",
    [
        chunk({"tool_calls": [{"index": 0, "function": {"name": "f"}}], "content": None}),
        chunk({"function_call": {"name": "f"}}),
        chunk({"reasoning_content": "Hm"}),
        chunk({"reasoning": "Hm"}),
        chunk({"refusal": "No"}),
        chunk({"content": "a"}, logprobs={"content": []}),
        chunk({"content": "a"}, index=1),
        b"data: no JSON\n\n",
        b'data: {"choices": "odd"}\n\n',
    ],
)
def test_what_is_not_plain_text_is_not_kept(event: bytes) -> None:
    found = spoken(chunk({"content": "a"}), event, chunk({"content": "b"}))
    assert (found.plain, found.text) == (False, "")


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "assistant", "content": None},
        {"content": "", "tool_calls": []},
        {"tool_calls": None},
        {"reasoning": ""},
    ],
)
def test_what_says_nothing_does_no_harm(delta: dict[str, Any]) -> None:
    found = spoken(chunk(delta), b": ping\n\n", chunk({"content": "a"}))
    assert (found.plain, found.text, found.tokens) == (True, "a", 1)


def test_there_is_an_end_to_what_is_kept() -> None:
    found = Spoken()
    one = chunk({"content": "x" * 1000})
    for _ in range(TEXT_BYTES // 1000):
        found.unread.append(one)
        found.read()
    assert (found.plain, len(found.text)) == (True, TEXT_BYTES // 1000 * 1000)
    found.unread.append(one)
    found.read()
    assert (found.plain, found.text) == (False, "")


def test_a_giant_event_is_not_read() -> None:
    found = spoken(chunk({"content": "a"}), chunk({"content": "x" * AT_ONCE_BYTES}))
    assert (found.plain, found.text) == (False, "")


def test_a_giant_event_in_pieces_is_not_held() -> None:
    found = Spoken()
    one = chunk({"content": "x" * 2 * AT_ONCE_BYTES})
    for at in range(0, len(one), 60_000):
        found.unread.append(one[at : at + 60_000])
        found.read()
    assert (found.plain, found._splitter.held_bytes) == (False, 0)


def test_blanks_at_the_end_are_counted() -> None:
    found = spoken(*(chunk({"content": text}) for text in ("a:", "\n", "\n", "  ")))
    assert (found.tokens, found.blanks) == (4, 3)
    found = spoken(*(chunk({"content": text}) for text in ("a:", "\n", "b")))
    assert (found.tokens, found.blanks) == (3, 0)


def test_what_the_next_engine_is_told() -> None:
    assert to_tell("The end.\n\n  ") == "The end."
    assert to_tell("half a \ufffd") == "half a"
    assert to_tell("été") == "été"
    assert to_tell(" \n") == ""


def test_events_before_an_error() -> None:
    said = chunk({"content": "a"}) + chunk({"content": "b"})
    dies = b'data: {"error": {"message": "dead", "code": 500}}\n\ndata: [DONE]\n\n'
    assert before_error(said + dies) == said
    assert before_error(dies) == b""
    assert before_error(said + b"event: error\ndata: {}\n\n") == said
    innocent = chunk({"content": '"error": "no"'})
    assert before_error(said + innocent) == said + innocent
