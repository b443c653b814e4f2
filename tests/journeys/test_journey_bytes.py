"""The client gets exactly the upstream's bytes, and the upstream exactly the client's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.journeys.stage import CHAT, Answer, Scripted, chat, event, gateway, provider, whole
from tests.replay import TRANSCRIPTS, Recording, Replay, load

#: folder of transcripts -> runtime
RUNTIMES = {
    "vllm": "vllm",
    "llama-server": "llamacpp",
    "llama-server-tools": "llamacpp",
    "ollama": "ollama",
    "litellm": "litellm",
}
_BODY = re.compile(rb"### BODY (.*)")


def recorded() -> list[tuple[str, str]]:
    """(transcript, path) of every recorded answer to a request that the gateway forwards."""
    found = []
    for folder in RUNTIMES:
        for file in sorted((TRANSCRIPTS / folder).glob("*.txt")):
            if file.name.startswith("95-"):  # a runtime's death; see the failures
                continue
            asked = re.match(rb"### POST (/v1/(?:chat/completions|completions|embeddings))\n", file.read_bytes())
            if asked:
                found.append((f"{folder}/{file.stem}", asked[1].decode()))
    return found


RECORDED = recorded()


def asked_for(name: str) -> dict[str, Any]:
    """The request that was recorded, as far as the capture script noted it."""
    found = _BODY.search((TRANSCRIPTS / f"{name}.txt").read_bytes())
    assert found, name
    try:
        document: dict[str, Any] = json.loads(found[1])
    except json.JSONDecodeError:  # the script cut a long prompt short in its note
        return chat("smol", stream=b'"stream": true' in found[1] or "stream" in name)
    return document


def usage_chunk(body: bytes) -> bytes:
    """The event of a recorded stream that carries the usage and nothing else; b"" if there is none."""
    for one in body.split(b"\n\n")[:-1]:
        data = one.removeprefix(b"data: ")
        if data.startswith(b"{") and b'"usage":{' in data:
            document = json.loads(data)
            choices = document["choices"]
            if not choices or (document["usage"] and all(c == {"index": 0, "delta": {}} for c in choices)):
                return one + b"\n\n"
    return b""


async def replayed(recording: Recording, path: str, runtime: str, request: dict[str, Any]) -> tuple[Answer, bytes]:
    """The answer through the gateway, and the body that reached the upstream."""
    routes = {("POST", path): [recording]}
    async with Replay(routes) as replay:
        served = provider("recorded", f"{replay.url}/v1", runtime=runtime, models=[request["model"]])
        async with gateway(served) as here:
            answer = await here.ask("POST", path, request)
            here.assert_idle()
        (seen,) = [one for one in replay.seen if one.method == "POST"]
        return answer, seen.body


def test_there_are_recordings_of_every_runtime() -> None:
    assert len(RECORDED) > 50
    assert {name.partition("/")[0] for name, _ in RECORDED} == set(RUNTIMES)
    assert {path for _, path in RECORDED} >= {"/v1/chat/completions", "/v1/completions"}


@pytest.mark.parametrize(("name", "path"), RECORDED, ids=[name for name, _ in RECORDED])
async def test_a_client_that_asks_for_usage_gets_the_recorded_bytes(name: str, path: str) -> None:
    (recording,) = load(name)[:1]
    request = asked_for(name)
    if request.get("stream"):
        request["stream_options"] = {"include_usage": True}
    answer, sent = await replayed(recording, path, RUNTIMES[name.partition("/")[0]], request)
    assert answer.status == recording.status
    assert answer.body == recording.body
    assert sent == json.dumps(request).encode(), "nothing had to be changed in the request"


STREAMS = [(name, path) for name, path in RECORDED if asked_for(name).get("stream") and load(name)[0].status == 200]


@pytest.mark.parametrize(("name", "path"), STREAMS, ids=[name for name, _ in STREAMS])
async def test_a_client_that_does_not_ask_gets_all_but_the_usage_chunk(name: str, path: str) -> None:
    (recording,) = load(name)[:1]
    request = asked_for(name)
    request.pop("stream_options", None)
    runtime = RUNTIMES[name.partition("/")[0]]
    answer, sent = await replayed(recording, path, runtime, request)
    if runtime == "llamacpp":  # says its counts unasked, so nothing is asked and nothing taken out
        assert answer.body == recording.body
        assert sent == json.dumps(request).encode()
        return
    chunk = usage_chunk(recording.body)
    expected = recording.body.replace(chunk, b"") if chunk else recording.body
    assert len(expected) == len(recording.body) - len(chunk)
    assert answer.body == expected
    assert json.loads(sent) == {**request, "stream_options": {"include_usage": True}}
    assert sent.startswith(json.dumps(request).encode()[:-1]), "what the client wrote comes first, untouched"


def test_some_recorded_streams_have_a_usage_chunk() -> None:
    having = {name.partition("/")[0] for name, _ in STREAMS if usage_chunk(load(name)[0].body)}
    assert having >= {"vllm", "llama-server", "ollama", "litellm"}


# -- requests -----------------------------------------------------------------------------------------------------

ODD_REQUEST = (
    b'\t{ "zzz" : [1.50, 1e3,  -0.0],\r\n "messages":[ {"role":"user","content":"caf\\u00e9 \xe2\x82\xac"} ] ,'
    b'"model"\n:"sim","unknown_field":{"b":1,"a":null},"chat_template_kwargs":{"enable_thinking":false},'
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"tool_choice":"auto",'
    b'"logprobs":true,"top_logprobs":2, "stream": false}  \n'
)


async def test_a_request_that_needs_no_change_goes_upstream_byte_for_byte() -> None:
    async with (
        Scripted(answer=whole(b"{}")) as upstream,
        gateway(provider("one", upstream.url, api_key="sk-upstream")) as here,
    ):
        assert (await here.ask("POST", CHAT, ODD_REQUEST)).status == 200
        assert upstream.seen[0].body == ODD_REQUEST
        assert upstream.seen[0].path == CHAT


async def test_a_patch_touches_nothing_else() -> None:
    async with Scripted(answer=whole(b"{}")) as upstream, gateway(provider("one", upstream.url)) as here:
        streamed = ODD_REQUEST.replace(b'"stream": false', b'"stream": true')
        await here.ask("POST", CHAT, streamed)
        sent = upstream.seen[0].body
        assert sent.replace(b',"stream_options":{"include_usage":true}', b"") == streamed
        assert sent != streamed


async def test_nothing_is_added_as_null() -> None:
    async with Scripted(answer=whole(b"{}")) as upstream, gateway(provider("one", upstream.url)) as here:
        for stream in (False, True):
            await here.ask("POST", "/api/local-llm/" + ("stream" if stream else "proxy"), chat(provider="one"))
        first, second = (json.loads(seen.body) for seen in upstream.seen)
        assert first == chat(stream=False)
        assert second == chat(stream=True, stream_options={"include_usage": True})


# -- odd answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 404, 422, 429, 500, 503])
async def test_an_unstreamed_answer_passes_with_its_status(status: int) -> None:
    body = b'{"error" : {"message":"as  it\\u0020is", "code":%d}}\n\n' % status
    raw = whole(body, "application/json; charset=utf-8", f"{status} Whatever", "x-custom: yes\r\n")
    async with Scripted(answer=raw) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert (answer.status, answer.body) == (status, body)
        assert answer.header("Content-Type") == "application/json; charset=utf-8"
        assert answer.header("x-custom") == "yes"
        assert here.record.status == status


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 1_048_575, 1_048_576, 5_000_000])
async def test_bodies_of_any_size(size: int) -> None:
    body = bytes(i * 7 % 251 for i in range(1009)) * (size // 1009 + 1)
    async with (
        Scripted(answer=whole(body[:size], "application/octet-stream")) as upstream,
        gateway(provider("one", upstream.url)) as here,
    ):
        answer = await here.ask("POST", CHAT, chat())
        assert answer.body == body[:size]
        assert here.record.response_bytes == size


async def test_an_event_stream_with_a_length_of_its_own() -> None:
    """A stream that comes with Content-Length is no less a stream: it is metered, and may lose its usage chunk."""
    events = event() + b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    async with (
        Scripted(answer=whole(events, "text/event-stream")) as upstream,
        gateway(provider("one", upstream.url)) as here,
    ):
        answer = await here.ask("POST", CHAT, chat(stream=True))
        assert answer.body == events
        assert here.record.outcome == "ok"
