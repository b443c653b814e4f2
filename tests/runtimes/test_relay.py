"""What the gateway adds and what it must not touch, in front of a real llama.cpp server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import statistics
import struct
import subprocess
import time
from dataclasses import replace
from typing import Any

import openai
import pytest

from gateway.runtimes import RUNTIMES

from .conftest import Answer, Door, Gateway, Llama, until
from .test_openai_sdk import QUESTION, TOOL

CHAT = "/v1/chat/completions"


def chat(model: str = "smol", **more: Any) -> dict[str, Any]:
    """A request whose answer is the same each time: greedy, and from an empty cache."""
    fixed = {"max_tokens": 24, "temperature": 0, "seed": 1, "cache_prompt": False}
    return {"model": model, "messages": QUESTION, **fixed, **more}


def masked(body: bytes) -> bytes:
    """`body` without what differs between two equal runs: the id, the time, and llama.cpp's timings."""
    body = re.sub(rb'"id":"[^"]*"', b'"id":""', body)
    body = re.sub(rb'"created":\d+', b'"created":0', body)
    return re.sub(rb'"timings":\{[^}]*\}', b'"timings":{}', body)


# --- byte for byte


def own_answer(llama: Llama, path: str, body: dict[str, Any]) -> Answer:
    """What the runtime says to the request as the gateway sends it, less the usage chunk that nobody asked for.

    Asked for usage, llama.cpp moves its `timings` into that chunk, so this is not what it says to `body` itself.
    """
    if not (body.get("stream") and "stream_options" not in body and RUNTIMES["llamacpp"].inject_usage):
        return llama.send("POST", path, body)
    answer = llama.send("POST", path, body | {"stream_options": {"include_usage": True}})
    events = [event for event in answer.body.split(b"\n\n") if b'"choices":[],' not in event]
    return replace(answer, body=b"\n\n".join(events))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (CHAT, chat(stream=True)),
        (CHAT, chat(stream=True, stream_options={"include_usage": True})),
        (CHAT, chat(stream=True, n=2)),
        (CHAT, chat(stream=True, logprobs=True, top_logprobs=2)),
        ("/v1/completions", {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8, "stream": True,
                             "temperature": 0, "cache_prompt": False}),
        (CHAT, chat(messages=[{"role": "user", "content": "hello " * 4000}])),
        (CHAT, chat(messages=[{"role": "user", "content": "hello " * 4000}], stream=True)),
        (CHAT, chat(max_tokens="many")),
        ("/v1/embeddings", {"model": "smol", "input": ["hello"]}),
    ],
    ids=["chat", "stream", "stream-usage", "stream-n2", "stream-logprobs", "completions-stream", "too-long",
         "too-long-stream", "bad-type", "embeddings-501"],
)  # fmt: skip
def test_the_answer_is_the_runtimes_own_bytes(llama: Llama, gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    direct, relayed = own_answer(llama, path, body), gateway.send("POST", path, body)
    assert relayed.status == direct.status
    assert relayed.headers["content-type"] == direct.headers["content-type"]
    if path == CHAT and body.get("n") == 2:  # two choices race each other: their events interleave as they come
        assert sorted(masked(relayed.body).split(b"\n\n")) == sorted(masked(direct.body).split(b"\n\n"))
    else:
        assert masked(relayed.body) == masked(direct.body)


def test_curl_streams(gateway: Gateway) -> None:
    """Events arrive one by one while the model still writes, and the stream ends as the runtime ends it."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps(chat(stream=True, max_tokens=64, ignore_eos=True))
    command = [curl, "-sSN", "--max-time", "30", gateway.url + "/chat/completions", "-d", body]
    command += ["-H", f"Authorization: Bearer {gateway.key}", "-H", "Content-Type: application/json"]
    arrived: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"data: "):
                arrived.append(time.monotonic())
                last = line
    assert process.returncode == 0
    assert last == b"data: [DONE]\n"
    assert len(arrived) > 40
    assert arrived[-1] - arrived[0] > 0.1  # 64 tokens at 100 to 150 a second, not all at the end


# --- the client's own mistakes


def test_an_unknown_model_is_not_found(gateway: Gateway, llama: Llama) -> None:
    # the runtime itself would answer: llama.cpp ignores the name
    assert llama.send("POST", CHAT, chat("smoll", max_tokens=1)).status == 200
    with (
        openai.OpenAI(base_url=gateway.url, api_key=gateway.key, max_retries=0) as client,
        pytest.raises(openai.NotFoundError) as raised,
    ):
        client.chat.completions.create(model="smoll", messages=QUESTION)
    assert raised.value.code == "model_not_found"
    assert "smol" in raised.value.message.replace("smoll", "")  # names what is near


def test_a_bad_key_is_refused(gateway: Gateway) -> None:
    with (
        openai.OpenAI(base_url=gateway.url, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.chat.completions.create(model="smol", messages=QUESTION)
    assert raised.value.code == "invalid_api_key"
    assert "sk-wrong" not in raised.value.message


# --- tools


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_removed_for_a_model_without_them(gateway: Gateway, stream: bool) -> None:
    """llama.cpp answers 400 to this tool_choice when it sees it; here it does not see it."""
    body = chat("smol-plain", tools=[TOOL], tool_choice="bogus", parallel_tool_calls=True, stream=stream)
    answer = gateway.send("POST", CHAT, body)
    assert answer.status == 200, answer.body
    assert answer.headers["x-gateway-tools"] == "removed"
    assert gateway.send("POST", CHAT, body | {"model": "smol"}).status == 400


# --- the meter


def stream_usage(answer: Answer) -> dict[str, Any]:
    """The usage in a stream's last chunk."""
    found: dict[str, Any] = answer.events()[-1]["usage"]
    return found


def assert_counted(record: dict[str, Any], usage: dict[str, Any]) -> None:
    assert record["prompt_tokens"] == usage["prompt_tokens"] > 0
    assert record["completion_tokens"] == usage["completion_tokens"] > 0
    assert record["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert record["estimated"] is False


def test_counts_equal_the_runtimes_own(gateway: Gateway, llama: Llama) -> None:
    ask = {"include_usage": True}
    direct = stream_usage(llama.send("POST", CHAT, chat(stream=True, stream_options=ask)))

    whole = gateway.send("POST", CHAT, chat())
    assert whole.json()["usage"] == direct
    assert_counted(gateway.record(whole.headers["x-request-id"]), direct)

    asked = gateway.send("POST", CHAT, chat(stream=True, stream_options=ask))
    assert stream_usage(asked) == direct
    assert_counted(gateway.record(asked.headers["x-request-id"]), direct)

    unasked = gateway.send("POST", CHAT, chat(stream=True))  # the gateway asks, and keeps the answer to itself
    assert b'"usage"' not in unasked.body
    record = gateway.record(unasked.headers["x-request-id"])
    assert_counted(record, direct)
    assert record["stream"] is True
    assert (record["model"], record["provider"], record["status"]) == ("smol", "llama", 200)
    assert (record["route"], record["outcome"]) == (CHAT, "ok")
    assert 0 < record["ttft_s"] < record["duration_s"] < 30


def test_cached_prompt_tokens_are_counted(gateway: Gateway) -> None:
    body = chat(cache_prompt=True, stream=True, stream_options={"include_usage": True})
    answers = [gateway.send("POST", CHAT, body) for _ in range(3)]
    usages = [stream_usage(answer) for answer in answers]
    for answer, usage in zip(answers, usages, strict=True):
        assert_counted(gateway.record(answer.headers["x-request-id"]), usage)
    assert usages[-1]["prompt_tokens_details"]["cached_tokens"] > 0


def test_completions_are_counted(gateway: Gateway) -> None:
    body = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8, "cache_prompt": False}
    whole = gateway.send("POST", "/v1/completions", body)
    assert_counted(gateway.record(whole.headers["x-request-id"]), whole.json()["usage"])
    stream = gateway.send("POST", "/v1/completions", body | {"stream": True})
    record = gateway.record(stream.headers["x-request-id"])
    assert_counted(record, whole.json()["usage"])


def test_requests_are_in_the_metrics(gateway: Gateway) -> None:
    def count() -> float:
        text = Door("metrics", gateway.metrics_port).send("GET", "/metrics").body.decode()
        line = re.search(r'^gateway_requests_total\{route="/v1/chat/completions",status="200"\} (\S+)$', text, re.M)
        return float(line[1]) if line else 0.0

    before = count()
    answer = gateway.send("POST", CHAT, chat(max_tokens=2))
    gateway.record(answer.headers["x-request-id"])
    assert count() == before + 1


# --- the client goes away


def abort(door: Door, llama: Llama, how: str) -> tuple[float, str]:
    """Start a long stream, read three events, leave: seconds until the slots are free, the head."""
    until(lambda: llama.busy_slots() == 0, 10, lambda: "the slots were not free before the test")
    long = b'{"model":"smol","stream":true,"max_tokens":1500,"ignore_eos":true,"messages":[{"role":"user",'
    long += b'"content":"Tell me a long story."}]}'
    with socket.create_connection(("127.0.0.1", door.port), 10) as client:
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{door.port}\r\nAuthorization: Bearer {door.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(long)}\r\n\r\n".encode()
            + long
        )
        seen = b""
        while seen.count(b"data: ") < 3:
            seen += (got := client.recv(65536))
            assert got, seen
        assert llama.busy_slots() == 1
        if how == "rst":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left_at = time.monotonic()
    until(lambda: llama.busy_slots() == 0, 10, lambda: "the slot stays busy", every_s=0.002)
    return time.monotonic() - left_at, seen.partition(b"\r\n\r\n")[0].decode()


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_client_that_leaves_frees_the_slot(door: Door, llama: Llama, how: str) -> None:
    """Within 100 ms; the median of five, since the model's own threads want the cores all this runs on."""
    runs = [abort(door, llama, how) for _ in range(5)]
    assert statistics.median(seconds for seconds, _ in runs) < 0.1, runs
    if isinstance(door, Gateway):
        for _, head in runs:
            name = re.search(r"(?i)^x-request-id: (\S+)", head, re.M)
            assert name, head
            record = door.record(name[1])
            assert (record["outcome"], record["status"]) == ("client_gone", 499)
            assert record["completion_tokens"] >= 1  # what was relayed was used, and is counted
            assert record["estimated"] is True


# --- the gateway's own surface


def test_the_providers_page(gateway: Gateway) -> None:
    page = gateway.send("GET", "/api/local-llm/providers")
    assert page.status == 200
    assert b'"ok"' in page.body
    assert {"llama", "smol", "smol-plain"} <= set(re.findall(r'"([^"]*)"', page.body.decode()))


def test_proxy_and_stream_routes(gateway: Gateway, llama: Llama) -> None:
    body = chat(provider="llama")
    direct = llama.send("POST", CHAT, chat())
    whole = gateway.send("POST", "/api/local-llm/proxy", body)
    assert (whole.status, masked(whole.body)) == (200, masked(direct.body))

    direct = own_answer(llama, CHAT, chat(stream=True))
    stream = gateway.send("POST", "/api/local-llm/stream", body)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert masked(stream.body) == masked(direct.body)
