"""Messages and Responses of a real llama.cpp server through the gateway: its own bytes, its own counts on record."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pytest

from .conftest import Answer, Door, Gateway, Llama
from .test_openai_sdk import QUESTION

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
#: greedy: the same request has the same answer
FIXED: dict[str, Any] = {"model": "smol", "temperature": 0, "seed": 1, "cache_prompt": False}
ASKED: dict[str, dict[str, Any]] = {
    MESSAGES: {**FIXED, "messages": QUESTION, "max_tokens": 12},
    RESPONSES: {**FIXED, "input": "What is the capital of France?", "max_output_tokens": 12},
}


def masked(body: bytes) -> bytes:
    """`body` without what differs between two equal runs: ids, times, and llama.cpp's timings."""
    body = re.sub(rb'"(id|item_id)":"[^"]*"', rb'"\1":""', body)
    body = re.sub(rb'"(created_at|completed_at)":\d+', rb'"\1":0', body)
    return re.sub(rb'"timings":\{[^}]*\}', b'"timings":{}', body)


def counts(path: str, answer: Answer, stream: bool) -> tuple[int, int, int]:
    """(prompt, answer, cached) as the server itself says."""
    usage: dict[str, Any] = {}
    for document in answer.events() if stream else [answer.json()]:
        inner = document.get("message") or document.get("response") or document
        usage |= inner.get("usage") or document.get("usage") or {}
    if path == MESSAGES:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, usage["output_tokens"], cached
    return usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKED)
def test_bytes_and_counts_are_the_servers(llama: Llama, gateway: Gateway, path: str, stream: bool) -> None:
    asked = {**ASKED[path], "stream": stream}
    llama.send("POST", path, asked)  # Messages knows no cache_prompt: so that the prompt is cached for both
    own, ours = llama.send("POST", path, asked), gateway.send("POST", path, asked)
    assert own.status == ours.status == 200
    assert masked(ours.body) == masked(own.body)
    record = gateway.record(ours.headers["x-request-id"])
    prompt, completion, cached = counts(path, ours, stream)
    assert completion == 12
    assert (record["prompt_tokens"], record["completion_tokens"]) == (prompt, completion)
    assert record.get("cached_tokens") or cached == 0
    assert not record.get("estimated")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKED)
def test_a_cached_prompt_is_counted_whole(gateway: Gateway, path: str, stream: bool) -> None:
    asked = {**ASKED[path], "cache_prompt": True, "stream": stream}
    gateway.send("POST", path, asked)
    answer = gateway.send("POST", path, asked)
    prompt, _, cached = counts(path, answer, stream)
    record = gateway.record(answer.headers["x-request-id"])
    assert (record["prompt_tokens"], record["cached_tokens"]) == (prompt, cached)
    assert 0 < cached < prompt


def test_streamed_and_unstreamed_count_the_same(gateway: Gateway) -> None:
    for path, asked in ASKED.items():
        records = [
            gateway.record(gateway.send("POST", path, {**asked, "stream": stream}).headers["x-request-id"])
            for stream in (False, True)
        ]
        assert len({(one["prompt_tokens"], one["completion_tokens"]) for one in records}) == 1, path


def test_counting_is_not_charged(llama: Llama, gateway: Gateway) -> None:
    body = {"model": "smol", "messages": QUESTION}
    answer = gateway.send("POST", f"{MESSAGES}/count_tokens", body)
    assert answer.json() == llama.send("POST", f"{MESSAGES}/count_tokens", body).json()
    assert gateway.record(answer.headers["x-request-id"]).get("prompt_tokens") is None


def test_the_official_clients(door: Door) -> None:
    with anthropic.Anthropic(base_url=door.root, api_key=door.key, max_retries=0) as claude:
        with claude.messages.stream(model="smol", max_tokens=12, messages=QUESTION) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert final.content[0].type == "text"
        assert final.content[0].text == text != ""
        assert 0 < final.usage.output_tokens <= 12
    with openai.OpenAI(base_url=door.url, api_key=door.key, max_retries=0) as client:
        events = list(client.responses.create(model="smol", input="Hello", max_output_tokens=12, stream=True))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.usage is not None
    assert 0 < last.response.usage.output_tokens <= 12
    assert last.response.output_text == "".join(one.delta for one in events if one.type == "response.output_text.delta")


def test_what_llamacpp_was_not_started_for_is_its_own_501(llama: Llama, gateway: Gateway) -> None:
    body = {"model": "smol", "query": "a", "documents": ["b", "c"]}
    own, ours = llama.send("POST", "/v1/rerank", body), gateway.send("POST", "/v1/rerank", body)
    assert (ours.status, json.loads(ours.body)) == (501, json.loads(own.body))
