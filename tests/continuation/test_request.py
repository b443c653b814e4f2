"""Which requests can be continued, and what is asked for the rest of an answer: the client's bytes, spliced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.continuation.request import Finished, continuable, for_the_rest, stop_strings
from gateway.wire.body import Body

USER = {"role": "user", "content": "Why?"}


def body(**more: Any) -> Body:
    return Body.parse(json.dumps({"model": "m", "messages": [USER], "stream": True, **more}).encode())


def rest(asked: Body, text: str = "Because", tokens: int = 1, **more: Any) -> Any:
    chat = more.pop("chat", True)
    found = for_the_rest(
        asked, chat, text, tokens, unasked=more.pop("unasked", False), default=more.pop("default", None)
    )
    return None if found is None else json.loads(found)


@pytest.mark.parametrize(
    ("more", "can"),
    [
        ({}, True),
        ({"n": 1, "logprobs": False, "response_format": {"type": "text"}, "top_logprobs": None}, True),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"n": 2}, False),
        ({"best_of": 2}, False),
        ({"logprobs": True}, False),
        ({"logprobs": 0}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, False),
        ({"guided_json": {}}, False),
        ({"structured_outputs": {"choice": ["a"]}}, False),
        ({"grammar": "root ::= x"}, False),
        ({"tool_choice": "required"}, False),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, False),
        ({"min_tokens": 5}, False),
        ({"echo": True}, False),
        ({"add_generation_prompt": False}, False),
    ],
)
def test_what_can_be_continued(more: dict[str, Any], can: bool) -> None:
    assert continuable(body(**more), chat=True) is can


@pytest.mark.parametrize(("prompt", "can"), [("Once", True), ([1, 2], False), (["Once"], False)])
def test_a_completion_has_one_prompt_of_text(prompt: Any, can: bool) -> None:
    assert continuable(Body.parse(json.dumps({"model": "m", "prompt": prompt}).encode()), chat=False) is can


def test_the_text_becomes_the_last_message_and_every_other_byte_stays() -> None:
    raw = b'{ "model" : "m",\t"messages":[ {"role":"user","content":"\\u0041 1.50"} ] , "odd": 1.50, "seed":7}'
    found = for_the_rest(Body.parse(raw), True, 'It "is"', 2, unasked=False, default=None)
    assert found == (
        b'{ "model" : "m",\t"messages":[ {"role":"user","content":"\\u0041 1.50"},'
        b'{"role":"assistant","content":"It \\"is\\""}] , "odd": 1.50, "seed":7,'
        b'"add_generation_prompt":false,"continue_final_message":true}'
    )


def test_flags_of_the_client_are_set_not_doubled() -> None:
    found = rest(body(add_generation_prompt=True))
    assert (found["add_generation_prompt"], found["continue_final_message"]) == (False, True)


def test_a_completion_goes_on_at_the_end_of_its_prompt() -> None:
    asked = Body.parse(b'{"model":"m","prompt":"Once \\u0075pon", "max_tokens":9}')
    assert for_the_rest(asked, False, ' a "time', 3, unasked=False, default=16) == (
        b'{"model":"m","prompt":"Once \\u0075pon a \\"time", "max_tokens":6}'
    )


def test_lengths_shrink() -> None:
    assert rest(body(max_tokens=10, max_completion_tokens=8, n_predict=-1), tokens=3)["max_completion_tokens"] == 5
    found = rest(body(max_tokens=10, max_completion_tokens=8, n_predict=-1), tokens=3)
    assert (found["max_tokens"], found["n_predict"]) == (7, -1)
    assert "max_tokens" not in rest(body(), tokens=3)
    assert rest(body(), tokens=3, default=16)["max_tokens"] == 13  # what the runtime would have taken for itself
    for tokens in (8, 9):
        with pytest.raises(Finished):
            rest(body(max_tokens=8), tokens=tokens)


def test_before_any_text_the_same_is_asked_again() -> None:
    asked = body(max_tokens=8)
    assert for_the_rest(asked, True, "", 0, unasked=False, default=None) is asked.raw
    assert rest(asked, "", 2)["max_tokens"] == 6  # blanks that nobody tells an engine


def test_a_prefill_of_the_clients_own() -> None:
    prefill = {"role": "assistant", "content": "Well, "}
    wished = {"add_generation_prompt": False, "continue_final_message": True}
    assert rest(body(messages=[USER, prefill], **wished))["messages"] == [
        USER,
        {"role": "assistant", "content": "Well, Because"},
    ]
    # llama.cpp goes on with it unasked, vLLM began a new turn after it
    assert rest(body(messages=[USER, prefill]), unasked=True)["messages"][-1]["content"] == "Well, Because"
    assert rest(body(messages=[USER, prefill]), "Well, Be", unasked=True)["messages"][-1]["content"] == "Well, Be"
    assert rest(body(messages=[USER, prefill]))["messages"] == [
        USER,
        prefill,
        {"role": "assistant", "content": "Because"},
    ]
    assert rest(body(messages=[USER]), unasked=True)["messages"][-1] == {"role": "assistant", "content": "Because"}


@pytest.mark.parametrize(
    "last",
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant"},
    ],
)
def test_a_prefill_that_cannot_be_added_to(last: dict[str, Any]) -> None:
    assert rest(body(messages=[USER, last], add_generation_prompt=False, continue_final_message=True)) is None


def test_a_last_message_that_says_its_content_twice() -> None:
    raw = b'{"messages":[{"role":"assistant","content":"a","content":"b"}],"continue_final_message":true}'
    assert for_the_rest(Body.parse(raw), True, "x", 1, unasked=False, default=None) is None


def test_odd_messages_are_not_made_worse() -> None:
    assert rest(body(messages=[]))["messages"] == [{"role": "assistant", "content": "Because"}]
    assert rest(body(messages={"odd": 1})) is None


def test_stop_strings() -> None:
    assert stop_strings(body(stop="END")) == ["END"]
    assert stop_strings(body(stop=["a", "", 3, "b"])) == ["a", "b"]
    assert stop_strings(body()) == []
