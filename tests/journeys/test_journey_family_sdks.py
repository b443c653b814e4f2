"""The official clients of the other families through the gateway: Anthropic's, Ollama's, and OpenAI's for Responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

from gateway.config import Model
from tests.journeys.stage import SSE_HEAD, Gateway, Scripted, framed, gateway, provider
from tests.replay import Recording, Replay, Seen, load

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
PATHS = {
    "/v1/messages": ("60-anthropic-messages", "61-anthropic-messages-stream"),
    "/v1/responses": ("65-responses", "66-responses-stream"),
    "/api/chat": ("o11-chat", "o10-chat-stream"),
    "/api/generate": ("o13-generate", "o12-generate-stream"),
}


class Engine(Replay):
    """A replay that answers a request in the form that was asked for."""

    def __init__(self, folder: str) -> None:
        self._forms: dict[str, tuple[list[Recording], list[Recording]]] = {}
        for path, names in PATHS.items():
            if folder == "ollama" or not path.startswith("/api/"):
                whole, stream = (load(f"{folder}/{name}") for name in names)
                self._forms[path] = whole, stream
        super().__init__({})
        if folder != "ollama":
            self.routes["POST", "/v1/messages/count_tokens"] = load(f"{folder}/62-anthropic-count-tokens")

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if seen.path in self._forms:
            native = seen.path.startswith("/api/")
            asked = json.loads(seen.body).get("stream", native)
            self.routes["POST", seen.path] = self._forms[seen.path][bool(asked)]
        return await super()._answer(seen, reader, writer)


@pytest.fixture(params=["vllm", "llama-server", "ollama"])
async def here(request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    runtime = {"llama-server": "llamacpp"}.get(request.param, request.param)
    async with Engine(request.param) as engine:
        models = [Model("smol", "Smol", aliases=("small",))]
        async with gateway(provider("one", f"{engine.url}/v1", runtime=runtime, models=models)) as one:
            yield one


@pytest.fixture
async def claude(here: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=here.url, api_key=here.key, max_retries=0) as client:
        yield client


# -- Anthropic ------------------------------------------------------------------------------------------------------


async def test_messages(claude: anthropic.AsyncAnthropic, here: Gateway) -> None:
    answer = await claude.messages.create(model="small", max_tokens=16, messages=QUESTION)
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    cached = answer.usage.cache_read_input_tokens or 0
    assert here.record.prompt_tokens == answer.usage.input_tokens + cached
    assert here.record.completion_tokens == answer.usage.output_tokens


async def test_messages_streamed(claude: anthropic.AsyncAnthropic, here: Gateway) -> None:
    async with claude.messages.stream(model="small", max_tokens=8, messages=QUESTION) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    cached = final.usage.cache_read_input_tokens or 0
    await here.settled(1)
    assert here.record.prompt_tokens == final.usage.input_tokens + cached
    assert here.record.completion_tokens == final.usage.output_tokens == 8


async def test_tokens_are_counted(claude: anthropic.AsyncAnthropic, here: Gateway) -> None:
    if here.app.catalog.upstreams[0].runtime.name == "ollama":
        with pytest.raises(anthropic.NotFoundError, match=r"Ollama has .*/v1/messages"):
            await claude.messages.count_tokens(model="small", messages=QUESTION)
        return
    assert (await claude.messages.count_tokens(model="small", messages=QUESTION)).input_tokens == 37
    assert here.record.prompt_tokens is None


async def test_errors_are_what_anthropics_client_knows(claude: anthropic.AsyncAnthropic, here: Gateway) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(model="nonesuch", max_tokens=8, messages=QUESTION)
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": missing.value.body["error"]["message"]},  # type: ignore[index,call-overload]
        "request_id": here.record.request_id,
    }
    with pytest.raises(anthropic.AuthenticationError):
        await claude.with_options(api_key="wrong").messages.create(model="small", max_tokens=8, messages=QUESTION)


async def test_anthropics_client_sees_that_a_stream_broke() -> None:
    (recording,) = load("vllm/61-anthropic-messages-stream")[:1]
    cut = recording.body[: recording.body.index(b"event: message_delta")]
    async with Scripted(answer=SSE_HEAD + framed(cut)) as upstream, gateway(provider("one", upstream.url)) as here:
        client = anthropic.AsyncAnthropic(base_url=here.url, api_key=here.key, max_retries=0)
        with pytest.raises(anthropic.APIStatusError) as broken:
            async with client, client.messages.stream(model="sim", max_tokens=8, messages=QUESTION) as stream:
                await stream.get_final_message()
        assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index,call-overload]
        await here.settled(1)
        assert here.record.outcome == "partial"


# -- Responses ------------------------------------------------------------------------------------------------------


async def test_responses(here: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.key, max_retries=0) as client:
        answer = await client.responses.create(model="small", input="What is the capital of France?")
        assert answer.output_text
        assert answer.usage is not None
        assert here.record.prompt_tokens == answer.usage.input_tokens
        assert here.record.completion_tokens == answer.usage.output_tokens
        stream = await client.responses.create(model="small", input="What is the capital of France?", stream=True)
        events = [one async for one in stream]
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text != ""
    await here.settled(2)
    assert last.response.usage is not None
    assert here.record.completion_tokens == last.response.usage.output_tokens
    assert here.record.prompt_tokens == last.response.usage.input_tokens


async def test_openais_client_sees_that_a_response_broke() -> None:
    (recording,) = load("vllm/66-responses-stream")[:1]
    cut = recording.body[: recording.body.index(b"event: response.completed")]
    async with Scripted(answer=SSE_HEAD + framed(cut)) as upstream, gateway(provider("one", upstream.url)) as here:
        client = openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.key, max_retries=0)
        async with client:
            events = [one async for one in await client.responses.create(model="sim", input="Hi", stream=True)]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.message
    assert last.response.id == events[0].response.id  # type: ignore[union-attr]  # response.created


# -- Ollama ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def llama(here: Gateway) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=here.url, headers={"Authorization": f"Bearer {here.key}"})
    yield client
    await client.close()


@pytest.mark.parametrize("here", ["ollama"], indirect=True)
async def test_ollamas_client(llama: ollama.AsyncClient, here: Gateway) -> None:
    answer = await llama.chat(model="small", messages=QUESTION)
    assert answer.message.content == "The capital of France is Paris."
    assert (here.record.prompt_tokens, here.record.completion_tokens) == (answer.prompt_eval_count, answer.eval_count)
    pieces = [one async for one in await llama.chat(model="small", messages=QUESTION, stream=True)]
    assert "".join(one.message.content or "" for one in pieces) == answer.message.content
    assert pieces[-1].done
    await here.settled(2)
    assert here.record.completion_tokens == pieces[-1].eval_count
    made = await llama.generate(model="small", prompt="Once upon a time")
    assert made.response
    assert {one.model for one in (await llama.list()).models} == {"smol", "small"}
    assert (await llama.ps()).models == []
    with pytest.raises(ollama.ResponseError) as missing:
        await llama.chat(model="nonesuch", messages=QUESTION)
    assert missing.value.status_code == 404
    assert "nonesuch" in missing.value.error
    with pytest.raises(ollama.ResponseError) as refused:
        await llama.pull("small")
    assert refused.value.status_code == 404


async def test_ollamas_client_sees_that_a_stream_broke() -> None:
    (recording,) = load("ollama/o10-chat-stream")[:1]
    cut = recording.body[: recording.body.rindex(b"\n", 0, -1) + 1]
    head = SSE_HEAD.replace(b"text/event-stream", b"application/x-ndjson")
    served = Scripted(answer=head + framed(cut))
    async with served as upstream, gateway(provider("one", upstream.url, runtime="ollama")) as here:
        client = ollama.AsyncClient(host=here.url, headers={"Authorization": f"Bearer {here.key}"})
        try:
            with pytest.raises(ollama.ResponseError, match="in the middle of its answer"):
                async for _ in await client.chat(model="sim", messages=QUESTION, stream=True):
                    pass
        finally:
            await client.close()
