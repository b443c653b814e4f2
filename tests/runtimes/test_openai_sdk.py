"""The official `openai` client, straight at llama.cpp and through the gateway: same answers, same errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .conftest import Door

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
#: greedy, and from an empty cache: the same request has the same answer, whatever ran before it
FIXED: dict[str, Any] = {"temperature": 0, "seed": 1, "extra_body": {"cache_prompt": False}}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def client(door: Door) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=door.url, api_key=door.key, max_retries=0, timeout=50) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert "smol" in [model.id for model in client.models.list()]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=16, **FIXED)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens + 16 == answer.usage.total_tokens


async def test_async_chat_and_stream(door: Door) -> None:
    async with openai.AsyncOpenAI(base_url=door.url, api_key=door.key, max_retries=0, timeout=50) as client:
        answer = await client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=16, **FIXED)
        stream = await client.chat.completions.create(
            model="smol", messages=QUESTION, max_tokens=16, stream=True, **FIXED
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer.choices[0].message.content != ""


def test_a_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=24, **FIXED)
    chunks = list(client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=24, stream=True, **FIXED))
    # a chunk without choices is a usage chunk, and nobody asked for one: clients index choices[0] blindly
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 5


def test_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=24, **FIXED)
    *chunks, last = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        **FIXED,
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_tools(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="smol", messages=QUESTION, max_tokens=8, tools=[TOOL], tool_choice="auto", **FIXED
    )
    assert raw.parse().choices[0].message.content
    assert "x-gateway-tools" not in raw.headers


def test_tools_reach_the_runtime(client: openai.OpenAI) -> None:
    """This model's template ignores tools: a choice that llama.cpp refuses is what shows that they arrive."""
    bogus: Any = "bogus"
    with pytest.raises(openai.BadRequestError, match="Invalid tool_choice: bogus"):
        client.chat.completions.create(
            model="smol", messages=QUESTION, max_tokens=8, tools=[TOOL], tool_choice=bogus, **FIXED
        )


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smol", prompt="Once upon a time", max_tokens=8, **FIXED)
    stream = client.completions.create(model="smol", prompt="Once upon a time", max_tokens=8, stream=True, **FIXED)
    assert answer.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == answer.choices[0].text


def test_embeddings_that_the_runtime_does_not_serve(client: openai.OpenAI) -> None:
    """llama.cpp without --embeddings says 501: its own status and words, not an error of the gateway's."""
    with pytest.raises(openai.InternalServerError) as raised:
        client.embeddings.create(model="smol", input=["hello"])
    assert raised.value.status_code == 501
    assert raised.value.type == "not_supported_error"
    assert "--embeddings" in raised.value.message


def test_a_prompt_longer_than_the_context(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello " * 4000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="smol", messages=messages, max_tokens=4, stream=stream)
        assert raised.value.type == "exceed_context_size_error"
