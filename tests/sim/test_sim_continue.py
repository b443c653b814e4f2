"""An answer asked for with its beginning given goes on as it would have: same text, same end, same count."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.sim import SimServer
from gateway.sim.text import beginnings, rest, tokenize, write

from .conftest import ask

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def body(path: str, begun: str = "", **more: Any) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"model": "sim", "prompt": "Once upon a time" + begun, **more}
    messages = [{"role": "user", "content": "Tell me."}]
    if begun:
        messages.append({"role": "assistant", "content": begun})
        more |= {"add_generation_prompt": False, "continue_final_message": True}
    return {"model": "sim", "messages": messages, **more}


def facts(document: dict[str, Any]) -> tuple[str, str, int, int]:
    """(text, finish_reason, tokens of the prompt, tokens of the answer) of an unstreamed answer."""
    choice, usage = document["choices"][0], document["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]


async def answer(engine: SimServer, path: str, begun: str = "", **more: Any) -> tuple[str, str, int, int]:
    reply = await ask(engine, path, body(path, begun, **more))
    assert reply.status == 200, reply.body
    return facts(json.loads(reply.body))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("length", [{"max_tokens": 24}, {"sim": {"tokens": 24}, "max_tokens": 100}])
@pytest.mark.parametrize("opening", ["", "As I said, it goes like this."])
async def test_at_every_token(path: str, length: dict[str, Any], opening: str) -> None:
    async with SimServer(opening=opening) as sim:
        text, finish, prompt, tokens = await answer(sim, path, **length)
        made = tokenize(text)
        assert len(made) == tokens - (finish == "stop")
        for at in range(1, len(made)):
            begun = "".join(made[:at])
            left = dict(length)
            left["max_tokens"] -= at
            more = await answer(sim, path, begun, **left)
            assert more == (text[len(begun) :], finish, prompt + at, tokens - at), begun


async def test_what_is_not_its_own_beginning_is_followed_by_another_text() -> None:
    async with SimServer() as sim:
        text, *_ = await answer(sim, CHAT, begun="Not what it would have said", max_tokens=5)
        assert text.startswith(" ")
        assert len(tokenize(text)) == 5


async def test_llama_cpp_continues_unasked_and_repeats_the_beginning_unstreamed() -> None:
    async with SimServer() as plain, SimServer(runtime="llamacpp") as llama:
        messages = [{"role": "user", "content": "Tell me."}]
        text, *_ = await answer(plain, CHAT, max_tokens=12)
        begun = "".join(tokenize(text)[:5])
        asked = {"model": "any", "messages": [*messages, {"role": "assistant", "content": begun}], "max_tokens": 7}
        whole = json.loads((await ask(llama, CHAT, asked)).body)
        assert (facts(whole)[0], whole["model"]) == (text, "sim")
        reply = await ask(llama, CHAT, {**asked, "stream": True})
        first, *tokens, last, done = reply.events
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert begun + "".join(one["choices"][0]["delta"]["content"] for one in tokens) == text
        assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
        assert (last["timings"]["predicted_n"], done) == (7, "[DONE]")
        assert last["timings"]["prompt_n"] + last["timings"]["cache_n"] == facts(whole)[2]
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        *_, last, usage, done = (await ask(llama, CHAT, asked)).events
        assert "timings" not in last
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 7)


@pytest.mark.parametrize("runtime", ["vllm", "llamacpp"])
async def test_completions_streamed_have_usage_where_the_runtime_has_it(runtime: str) -> None:
    async with SimServer(runtime=runtime) as sim:
        reply = await ask(sim, COMPLETIONS, body(COMPLETIONS, stream=True, max_tokens=3))
        *_, last, done = reply.events
        assert done == "[DONE]"
        assert (last["choices"][0]["finish_reason"], "usage" in last) == ("length", runtime == "llamacpp")


def test_beginnings_are_found_at_the_earliest_place() -> None:
    made = write("seed", 40)
    text = "A prompt." + " " + "".join(made)
    assert next(iter(beginnings(text))) == len("A prompt.")
    assert list(beginnings("no text of ours")) == []


def test_rest_counts_a_token_cut_in_two_on_both_sides() -> None:
    made = write("seed", 10)
    found = rest("seed", "".join(made)[: len(made[0]) + 2], 3)
    assert found is not None
    assert (found[1], found[0][1:]) == (2, made[2:4])
    assert rest("seed", "otherwise", 3) is None
