"""The simulated engine beside recordings of vLLM 0.32.0: same request, same keys in the same order, same chunks."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from gateway.sim import SimServer

from .conftest import ask

RECORDED = Path(__file__).parent / "recorded"


class Recording:
    """One curl transcript: the request line, its body, the answer's head and body."""

    def __init__(self, name: str, room: Path = RECORDED) -> None:
        lines = (room / f"{name}.txt").read_text().split("\n")
        _, self.method, self.path, *_ = lines[0].split()
        self.request = lines[1].removeprefix("### BODY ") if lines[1].startswith("### BODY") else None
        at = next(n for n, line in enumerate(lines) if line.startswith("HTTP/"))
        blank = lines.index("", at)
        self.status = int(lines[at].split()[1])
        self.headers = [line.split(": ")[0] for line in lines[at + 1 : blank]]
        end = next((n for n, line in enumerate(lines) if line.startswith("### curl")), len(lines))
        self.body = "\n".join(lines[blank + 1 : end])

    @property
    def events(self) -> list[Any]:
        data = [line[6:] for line in self.body.split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in data]


def shape(value: Any) -> Any:
    """Keys in order and the types of the leaves; finish reasons and roles as they are."""
    if isinstance(value, dict):
        fixed = ("finish_reason", "role", "object", "type", "system_fingerprint")
        return [(key, item if key in fixed else shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


@pytest.fixture
async def smol() -> Any:
    async with SimServer(("smol",), context=512) as server:
        yield server


async def replay(sim: SimServer, recording: Recording, **faults: Any) -> Any:
    body = None
    if recording.request is not None:
        body = recording.request.encode()
        if faults:
            body = json.dumps({**json.loads(body), "sim": faults}).encode()
    return await ask(sim, recording.path, body, method=recording.method)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("02-models", None),
        ("10-chat", 8),
        ("16-chat-stop-length", None),
        ("20-completions", None),
        ("22-completions-list-prompt", None),
        ("41-missing-model", None),
    ],
)
async def test_answers_have_the_recorded_shape(smol: SimServer, name: str, tokens: int | None) -> None:
    recording = Recording(name)
    reply = await replay(smol, recording, **({"tokens": tokens} if tokens else {}))
    assert reply.status == 200
    ours, theirs = json.loads(reply.body), json.loads(recording.body)
    assert shape(ours) == shape(theirs)
    if "usage" in theirs:
        assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]
    names = {name for name, _ in reply.headers} - {"connection"}
    assert names == set(recording.headers)


async def test_stop_string_as_recorded(smol: SimServer) -> None:
    recording = Recording("18-chat-stop-string")
    request = json.loads(recording.request or "")
    full = json.loads((await ask(smol, recording.path, {**request, "stop": None})).body)
    word = full["choices"][0]["message"]["content"].split()[3]
    answer = json.loads((await ask(smol, recording.path, {**request, "stop": [word]})).body)
    assert shape(answer) == shape(json.loads(recording.body))
    assert answer["choices"][0]["stop_reason"] == word
    assert word not in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("11-chat-stream", 8),
        ("12-chat-stream-usage", 8),
        ("13-chat-stream-continuous-usage", 8),
        ("21-completions-stream", None),
    ],
)
async def test_streams_have_the_recorded_chunks(smol: SimServer, name: str, tokens: int | None) -> None:
    recording = Recording(name)
    reply = await replay(smol, recording, **({"tokens": tokens} if tokens else {}))
    assert [shape(event) for event in reply.events] == [shape(event) for event in recording.events]
    # one event in one HTTP chunk, no blank in the JSON, LF line ends
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in reply.chunks[:-1])
    assert b'": ' not in reply.body
    assert b"\r" not in reply.body
    assert {name for name, _ in reply.headers} - {"connection"} == set(recording.headers)


async def test_n2_stream_has_the_recorded_chunks(smol: SimServer) -> None:
    recording = Recording("15-chat-n2-stream")
    reply = await replay(smol, recording)
    for index in (0, 1):  # how the two interleave is a matter of timing
        ours, theirs = (
            [shape(event) for event in side.events if event != "[DONE]" and event["choices"][0]["index"] == index]
            for side in (reply, recording)
        )
        assert ours == theirs
    assert reply.events.count("[DONE]") == 1
    assert reply.events[-1] == "[DONE]"


async def test_tool_call_stream_has_the_recorded_chunks(smol: SimServer) -> None:
    recording = Recording("32-tools-required-stream")
    reply = await replay(smol, recording)
    ours, theirs = ([key for key, _ in groupby(shape(event) for event in side.events)] for side in (reply, recording))
    # theirs was cut by max_tokens, ours is complete: only the finish_reason differs
    assert json.dumps(ours).replace('tool_calls"], ["stop', 'length"], ["stop') == json.dumps(theirs)
    arguments = "".join(
        call["function"].get("arguments", "")
        for event in reply.events[:-1]
        for call in event["choices"][0]["delta"].get("tool_calls", [])
    )
    assert json.loads(arguments) == {"city": "some city"}


@pytest.mark.parametrize(
    "name",
    [
        "06-notfound",
        "40-unknown-model",
        "42-bad-json",
        "43-missing-messages",
        "44-empty-messages",
        "45-bad-param-type",
        "46-bad-temperature",
        "49-max-tokens-too-big",
        "50-get-on-post-endpoint",
    ],
)
async def test_errors_are_byte_for_byte_the_recorded_ones(smol: SimServer, name: str) -> None:
    recording = Recording(name)
    reply = await replay(smol, recording)
    assert (reply.status, reply.body.decode()) == (recording.status, recording.body.rstrip("\n"))
    assert {name for name, _ in reply.headers} - {"connection"} == set(recording.headers)


async def test_dying_worker_as_recorded(smol: SimServer) -> None:
    lines = (RECORDED / "95-engine-dies-mid-stream.txt").read_text().split("\n")
    recorded = "\n\n".join(line for line in lines if line.startswith("data: ")) + "\n\n"
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "sim": {"error_event_at_token": 2}}
    reply = await ask(smol, "/v1/chat/completions", body)
    assert reply.body.decode().endswith(recorded)
    assert reply.chunks[-1] == b""
