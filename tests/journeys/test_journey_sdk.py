"""The official OpenAI client, sync and async, through the gateway."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import openai
import pytest

from gateway.sim import SimServer
from tests.journeys.stage import Gateway, Scripted, chat, gateway, provider, whole

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer(models=("sim",)) as one:
        yield one


@pytest.fixture
async def here(sim: SimServer) -> AsyncIterator[Gateway]:
    async with gateway(provider("one", sim.url)) as one:
        yield one


@pytest.fixture
async def client(here: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.key, max_retries=0) as one:
        yield one


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["sim"]


async def test_chat(client: openai.AsyncOpenAI, here: Gateway) -> None:
    answer = await client.chat.completions.create(**chat(max_tokens=8))
    assert answer.choices[0].message.content
    assert answer.usage is not None
    await here.settled(1)
    assert here.record.completion_tokens == answer.usage.completion_tokens == 8
    assert here.record.prompt_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize("asked", [False, True])
async def test_stream(client: openai.AsyncOpenAI, here: Gateway, asked: bool) -> None:
    whole_text = (await client.chat.completions.create(**chat(max_tokens=12))).choices[0].message.content
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = [one async for one in await client.chat.completions.create(**chat(stream=True, max_tokens=12, **options))]
    with_choices = chunks[:-1] if asked else chunks
    assert all(chunk.choices for chunk in with_choices), "a client may index choices[0]"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in with_choices) == whole_text
    assert with_choices[-1].choices[0].finish_reason == "length"
    if asked:
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12


async def test_tools(client: openai.AsyncOpenAI) -> None:
    asked = chat(tools=TOOLS, tool_choice="required", max_tokens=60)
    answer = await client.chat.completions.create(**asked)
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "weather"  # type: ignore[union-attr]  # a function call
    names: list[str | None] = []
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        names += [call.function and call.function.name for call in chunk.choices[0].delta.tool_calls or []]
    assert names[0] == "weather"


async def test_logprobs_and_several_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**chat(n=2, max_tokens=4, logprobs=True, top_logprobs=2))
    assert len(answer.choices) == 2
    indexes = set()
    async for chunk in await client.chat.completions.create(**chat(n=2, max_tokens=4, stream=True)):
        indexes |= {choice.index for choice in chunk.choices}
    assert indexes == {0, 1}


async def test_completions_and_embeddings(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt="Once", max_tokens=5)
    assert answer.choices[0].text
    texts = [one.choices[0].text async for one in await client.completions.create(
        model="sim", prompt="Once", max_tokens=5, stream=True
    )]  # fmt: skip
    assert "".join(texts) == answer.choices[0].text
    found = await client.embeddings.create(model="sim", input=["a", "b"])
    assert len(found.data) == 2
    assert len(found.data[0].embedding) > 4


async def test_errors_are_what_the_client_knows(client: openai.AsyncOpenAI, here: Gateway, sim: SimServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**chat("nonesuch"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="sim", messages=[], extra_body={"MODEL": "x"})
    assert bad.value.status_code == 400
    with pytest.raises(openai.AuthenticationError) as nobody:
        await client.with_options(api_key="wrong").chat.completions.create(**chat())
    assert nobody.value.code == "invalid_api_key"
    sim.faults = {"status": 429, "retry_after": 3}
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(**chat())
    assert limited.value.response.headers["retry-after"] == "3"
    assert limited.value.response.headers["x-request-id"] == here.record.request_id
    sim.faults = {"status": 503}
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(**chat())
    sim.faults = {"silent": True}
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).chat.completions.create(**chat())
    await here.settled(6)


async def test_closing_a_stream_stops_the_engine(client: openai.AsyncOpenAI, here: Gateway, sim: SimServer) -> None:
    sim.faults = {"token_s": 0.01}
    stream = await client.chat.completions.create(**chat(stream=True, max_tokens=5000))
    async for _ in stream:
        break
    assert sim.engine.running == 1
    await stream.close()
    async with asyncio.timeout(2):
        while sim.engine.running or here.app.in_flight():
            await asyncio.sleep(0.002)
    assert here.record.outcome == "client_gone"


async def test_unknown_fields_and_headers_of_the_client_are_fine() -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    answered = {"id": "1", "object": "chat.completion", "created": 1, "model": "sim", "choices": [choice]}
    body = json.dumps(answered).encode()
    async with Scripted(answer=whole(body)) as upstream, gateway(provider("one", upstream.url)) as here:
        async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
            answer = await client.chat.completions.create(
                **chat(), extra_body={"chat_template_kwargs": {"enable_thinking": True}, "top_k": 4}
            )
        assert answer.choices[0].message.reasoning_content == "because"  # type: ignore[attr-defined]  # an extension of runtimes
        assert b'"chat_template_kwargs"' in upstream.seen[0].body
        assert b"null" not in upstream.seen[0].body


async def test_aiohttp_as_the_client(here: Gateway) -> None:
    headers = {"Authorization": f"Bearer {here.key}"}
    async with aiohttp.ClientSession(here.url, headers=headers) as session:
        for _ in range(3):
            async with session.post("/v1/chat/completions", json=chat(stream=True, max_tokens=6)) as response:
                assert response.content_type == "text/event-stream"
                lines = [line async for line in response.content]
            assert lines[-2] == b"data: [DONE]\n"
        async with session.get("/v1/models") as response:
            assert (await response.json())["object"] == "list"


class Thread:
    """The gateway and its engine on a loop of their own, for a client that blocks."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.here: Gateway = None  # type: ignore[assignment]  # set before `started`
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
        self.stop: asyncio.Event = None  # type: ignore[assignment]

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        async with SimServer() as sim, gateway(provider("one", sim.url)) as self.here:
            self.started.set()
            await self.stop.wait()


@pytest.fixture
def blocking() -> Iterator[openai.OpenAI]:
    thread = Thread()
    runner = threading.Thread(target=thread.run, name="gateway")
    runner.start()
    assert thread.started.wait(10)
    with openai.OpenAI(base_url=f"{thread.here.url}/v1", api_key=thread.here.key, max_retries=0) as client:
        yield client
    thread.loop.call_soon_threadsafe(thread.stop.set)
    runner.join(10)
    assert not runner.is_alive()


def test_the_synchronous_client(blocking: openai.OpenAI) -> None:
    answer = blocking.chat.completions.create(**chat(max_tokens=6))
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in blocking.chat.completions.create(**chat(max_tokens=6, stream=True))
    )
    assert text == answer.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        blocking.chat.completions.create(**chat("nonesuch"))
