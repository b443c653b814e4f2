"""The official OpenAI SDK against the simulated engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from gateway.sim import SimServer

MESSAGES: Any = [{"role": "user", "content": "Weather in Paris?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}},
            },
        },
    }
]


@pytest.fixture
async def client(sim: SimServer) -> Any:
    async with openai.AsyncOpenAI(base_url=sim.url, api_key="none", max_retries=0) as client:
        yield client


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["sim"]


async def test_chat_and_stream_agree(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20)
    stream = await client.chat.completions.create(
        model="sim", messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt=["Once", "Twice"], n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 20)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
async def test_forced_tool_call(client: openai.AsyncOpenAI, choice: Any) -> None:
    answer = await client.chat.completions.create(model="sim", messages=MESSAGES, tools=TOOLS, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "some city", "unit": "C", "days": 7}
    assert answer.choices[0].message.content is None
    async with client.chat.completions.stream(
        model="sim", messages=MESSAGES, tools=TOOLS, tool_choice=choice
    ) as stream:
        async for _ in stream:
            pass
        (streamed,) = (await stream.get_final_completion()).choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments


async def test_tools_left_to_the_model_are_answered_in_words(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="sim", messages=MESSAGES, tools=TOOLS)
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls
    forced = await client.chat.completions.create(
        model="sim", messages=MESSAGES, tools=TOOLS, extra_body={"sim": {"tool_call": True}}
    )
    assert forced.choices[0].finish_reason == "tool_calls"


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    packed = await client.embeddings.create(model="sim", input=["hello", "world", "hello"])
    plain = await client.embeddings.create(model="sim", input="hello", encoding_format="float")
    assert packed.data[0].embedding == packed.data[2].embedding != packed.data[1].embedding
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert len(plain.data[0].embedding) == 64
    short = await client.embeddings.create(model="sim", input="hello", dimensions=8)
    assert len(short.data[0].embedding) == 8


async def test_errors_become_the_sdks_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        await client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="sim", messages=MESSAGES, extra_body={"sim": {"status": 429}})
    stream = await client.chat.completions.create(
        model="sim", messages=MESSAGES, stream=True, extra_body={"sim": {"error_event_at_token": 2}}
    )
    with pytest.raises(openai.APIError, match="EngineCore"):
        _ = [chunk async for chunk in stream]
