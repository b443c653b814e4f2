"""The joint: two streams in, one out, without a seam; and one bill."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.continuation.joint import Joint, Unfit, ending
from gateway.continuation.meter import JoinedMeter, Stopped
from gateway.continuation.spoken import Spoken, to_tell
from gateway.errors import UpstreamBroken
from gateway.wire.usage import SseMeter, Usage
from tests import transcripts

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def stream(id: str, texts: list[str], *, chat: bool = True, prompt: int = 10, role: bool = True, usage: bool = True,
           finish: str = "length") -> list[bytes]:  # fmt: skip
    """The events of a whole answer, one for each text, as vLLM writes them."""
    head = {"id": id, "object": "chat.completion.chunk", "created": len(id), "model": f"model of {id}"}
    events = []
    if chat and role:
        events.append(event({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    for text in texts:
        says = {"delta": {"content": text}} if chat else {"text": text}
        events.append(event({**head, "choices": [{"index": 0, **says, "finish_reason": None}]}))
    last = {"delta": {}} if chat else {"text": ""}
    events.append(event({**head, "choices": [{"index": 0, **last, "finish_reason": finish}], "system_fingerprint": id}))
    if usage:
        counts = {"prompt_tokens": prompt, "completion_tokens": len(texts), "total_tokens": prompt + len(texts),
                  "prompt_tokens_details": {"cached_tokens": prompt - 1}}  # fmt: skip
        events.append(event({**head, "choices": [], "usage": counts}))
    return [*events, DONE]


def documents(data: bytes) -> list[Any]:
    lines = [one.removeprefix(b"data: ") for one in data.split(b"\n\n") if one]
    return [line if line == b"[DONE]" else json.loads(line) for line in lines]


def text_of(data: bytes) -> str:
    return "".join(
        (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
        for one in documents(data)
        if one != b"[DONE]"
        for choice in one["choices"]
    )


def joined(shown: list[bytes], following: list[bytes], *, chat: bool = True, stops: list[str] | None = None) -> bytes:
    """What the client has at the end."""
    said = Spoken()
    said.unread.append(b"".join(shown))
    said.read()
    joint = Joint(
        said.identity,
        chat,
        said=said.text,
        told=to_tell(said.text),
        stops=stops,
        tokens=said.tokens - said.blanks,
    )
    return b"".join([*shown, *(joint.feed(one) for one in following), joint.finish()])


TEXTS = ["The", " answer", ":", "\n\n", "   ", "é", " 1", "\n", "end"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("cut", range(len(TEXTS) + 1))
def test_no_seam_at_any_token(cut: int, chat: bool) -> None:
    whole = b"".join(stream("first", TEXTS, chat=chat))
    shown = stream("first", TEXTS, chat=chat)[: cut + chat]
    told = to_tell("".join(TEXTS[:cut]))
    tokens = next(n for n in range(len(TEXTS) + 1) if len("".join(TEXTS[:n])) >= len(told))
    following = stream("another", TEXTS[tokens:], chat=chat, prompt=10 + tokens)
    found = joined(shown, following, chat=chat)
    assert text_of(found) == text_of(whole)
    found_documents = [one for one in documents(found) if one != b"[DONE]"]
    name = "first" if shown else "another"
    assert {(one["id"], one["created"], one["model"]) for one in found_documents} == {
        (name, len(name), f"model of {name}")
    }
    assert found.count(b'"role"') == chat
    assert [one["choices"][0]["finish_reason"] for one in found_documents
            if one["choices"] and one["choices"][0].get("finish_reason")] == ["length"]  # fmt: skip
    assert found.endswith(DONE)
    assert found.count(DONE) == 1
    usage = found_documents[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 9, 19)
    assert usage["prompt_tokens_details"]["cached_tokens"] <= 10


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_in_any_pieces(size: int) -> None:
    shown, following = stream("first", TEXTS[:6], usage=False)[:7], b"".join(stream("b", TEXTS[6:], prompt=16))
    pieces = [following[at : at + size] for at in range(0, len(following), size)]
    assert joined(shown, pieces) == joined(shown, [following])


def test_recorded_continuations_follow_a_recorded_stream() -> None:
    """vLLM's and llama.cpp's own answers to such a request, behind the other's stream."""
    for first in ("vllm", "llama-server"):
        shown = transcripts.load(first, "11-chat-stream").body.split(b"\n\n")[:3]
        shown = [one + b"\n\n" for one in shown]
        for second in ("vllm", "llama-server-tools"):
            following = transcripts.load(second, "75-continue-final-message-stream").body
            found = joined(shown, [following])
            assert text_of(found) == text_of(b"".join(shown)) + " Paris."
            named = [one for one in documents(found) if one != b"[DONE]"]
            assert len({(one["id"], one["created"]) for one in named}) == 1
            assert all("timings" not in one for one in named)
            assert b'"role"' not in found.removeprefix(b"".join(shown))


def test_an_echo_of_what_was_told_is_not_shown() -> None:
    shown = stream("first", ["Three fruits", " that"])[:3]
    assert text_of(joined(shown, stream("b", ["Three fruits that are", " red"]))) == "Three fruits that are red"
    assert text_of(joined(shown, stream("b", ["Three fruits that", " are"]))) == "Three fruits that are"
    assert text_of(joined(stream("first", ["ha"])[:2], stream("b", ["ha", "ha"]))) == "hahaha"


def test_a_role_that_comes_with_text_leaves_the_text() -> None:
    ollama = event({"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": " Paris"}}]})
    found = joined(stream("first", ["It is"])[:2], [ollama])
    assert documents(found)[-1]["choices"] == [{"index": 0, "delta": {"content": " Paris"}}]


def test_after_nothing_was_shown_the_new_stream_is_the_first() -> None:
    whole = stream("b", TEXTS)
    assert documents(joined([], whole)) == documents(b"".join(whole))


def test_comments_pass_and_half_an_event_waits() -> None:
    joint = Joint(None, True)
    assert joint.feed(b": ping\n\n") == b": ping\n\n"
    assert joint.feed(b'data: {"choices":[]') == b""
    assert joint.feed(b"}\n\n") == b'data: {"choices":[]}\n\n'


def test_a_stop_string_across_the_seam_ends_the_answer() -> None:
    following = [
        event({"id": "b", "choices": [{"index": 0, "delta": {"content": text}}]}) for text in ("P", " here", "x")
    ]
    shown = stream("first", ["go", " ST", "O"])[:4]
    said = Spoken()
    said.unread.append(b"".join(shown))
    said.read()
    joint = Joint(said.identity, True, said=said.text, told=said.text, stops=["STOP he", "zzz"], tokens=3)
    meter = JoinedMeter(SseMeter(), SseMeter(), joint, said.identity, usage_wished=True)
    assert meter.feed(following[0], 1.0) == b""
    with pytest.raises(Stopped) as stopped:
        meter.feed(following[1], 2.0)
    last, usage, done = documents(stopped.value.rest)
    assert (last["choices"], last["id"]) == ([{"index": 0, "delta": {}, "finish_reason": "stop"}], "first")
    assert (usage["usage"]["completion_tokens"], done) == (5, b"[DONE]")
    assert meter.finished


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    following = stream("b", ["P", " it"])
    found = joined(stream("first", ["ST", "O"])[:3], following, stops=["STOP here"])
    assert text_of(found) == "STOP it"
    assert text_of(joined(stream("first", ["ST", "O"])[:3], stream("b", ["P"]), stops=["STOP here"])) == "STOP"


@pytest.mark.parametrize(
    "bad",
    [
        event({"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}}]}),
        event({"choices": [{"index": 0, "delta": {"reasoning": "Hm"}}]}),
        b"data: nothing\n\n",
        b"data: 3\n\n",
        event({"choices": [3]}),
    ],
)
def test_what_cannot_follow(bad: bytes) -> None:
    with pytest.raises(Unfit):
        Joint(None, True).feed(bad)
    with pytest.raises(UpstreamBroken):
        JoinedMeter(SseMeter(), SseMeter(), Joint(None, True), None).feed(bad, 0.0)


def test_usage_of_both_is_one_bill() -> None:
    before = SseMeter()
    for one in stream("first", TEXTS[:5])[:6]:
        before.feed(one, 1.0)
    now = SseMeter()
    meter = JoinedMeter(before, now, Joint(None, True, tokens=5), None)
    assert meter.result(100) == Usage(100, 5, estimated=True)  # nobody has said anything
    for one in stream("b", TEXTS[5:], prompt=15):
        meter.feed(one, 2.0)
    assert meter.result(100) == Usage(10, 9, 10, estimated=True)
    assert (meter.events, meter.first_content_at, meter.last_content_at, meter.finished) == (9, 1.0, 2.0, True)


def test_a_continuation_of_a_continuation_and_reported_counts() -> None:
    now = SseMeter()
    first = JoinedMeter(SseMeter(), SseMeter(), Joint(None, True, tokens=2), None)
    meter = JoinedMeter(first, now, Joint(None, True, tokens=7, prompt=9), None, exact=True)
    for one in stream("c", TEXTS[7:], prompt=17):
        meter.feed(one, 3.0)
    assert meter.result(0) == Usage(9, 9, 9)


def test_usage_in_every_chunk_and_zeros() -> None:
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    running = {"prompt_tokens": 14, "completion_tokens": 2, "total_tokens": 16, "odd": None}
    joint = Joint(None, True, tokens=4)
    for usage, expected in ((zeros, zeros), (running, {**running, "prompt_tokens": 10, "completion_tokens": 6}),
                             (None, None), ("odd", "odd")):  # fmt: skip
        document = {"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": usage}
        assert documents(joint.feed(event(document)))[0]["usage"] == expected


def test_endings() -> None:
    said = Spoken()
    said.unread.append(stream("first", ["a"])[0])
    said.read()
    finish, usage, done = documents(ending(said.identity, True, "length", (3, 4)))
    assert (finish["id"], finish["choices"]) == ("first", [{"index": 0, "delta": {}, "finish_reason": "length"}])
    assert (usage["choices"], usage["usage"]) == ([], {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7})
    assert done == b"[DONE]"
    assert documents(ending(said.identity, False, "length", None))[0]["choices"][0]["text"] == ""
    assert ending(said.identity, True, None, None) == DONE


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=6), max_size=80),
    st.integers(0, 80),
    st.integers(1, 5),
    st.booleans(),
)
def test_any_text_cut_anywhere_and_told_in_other_pieces(texts: list[str], cut: int, size: int, chat: bool) -> None:
    whole = "".join(texts)
    shown = stream("first", texts, chat=chat)[: min(cut, len(texts)) + chat]
    left = whole[len(to_tell("".join(texts[:cut]))) :]
    following = stream("b", [left[at : at + size] for at in range(0, len(left), size)], chat=chat)
    assert text_of(joined(shown, following, chat=chat)) == whole
