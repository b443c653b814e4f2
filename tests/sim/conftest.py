"""A bare HTTP client for the simulated engine's tests: raw sockets, no library between the bytes and the assertion."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.sim import SimServer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Reply:
    def __init__(self, head: bytes, wire: bytes, reset: bool) -> None:
        status, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status.split()[1]) if status else 0
        self.headers = [tuple(line.split(": ", 1)) for line in lines]
        self.wire = wire  # the body as framed
        self.reset = reset

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def chunks(self) -> list[bytes]:
        """The body's HTTP chunks; the terminating one is b""."""
        found, rest = [], self.wire
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            found.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return found

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks) if self.header("transfer-encoding") == "chunked" else self.wire

    @property
    def events(self) -> list[Any]:
        """The data of every SSE event, JSON decoded; `[DONE]` as it is."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            for event in self.events
            if event != "[DONE]" and "error" not in event
            for choice in event["choices"]
        )


async def ask(
    sim: SimServer, path: str, body: Any = None, *, headers: str = "", method: str = "", timeout_s: float = 5.0
) -> Reply:
    """One request on its own connection, read to the end of the connection."""
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(sim.host, sim.port, limit=1 << 24)
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\n{headers}content-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    data, reset = b"", False
    try:
        async with asyncio.timeout(timeout_s):
            while piece := await reader.read(1 << 16):
                data += piece
    except ConnectionResetError:
        reset = True
    finally:
        writer.transport.abort()
    head, _, wire = data.partition(b"\r\n\r\n")
    return Reply(head, wire, reset)


async def chat(sim: SimServer, *, headers: str = "", **fields: Any) -> Reply:
    """A chat completion; `faults=` goes into the body's field `sim`."""
    body = {"model": sim.models[0], "messages": MESSAGES, "max_tokens": 8, **fields}
    if "faults" in body:
        body["sim"] = body.pop("faults")
    return await ask(sim, "/v1/chat/completions", body, headers=headers)


async def stream(sim: SimServer, *, headers: str = "", **fields: Any) -> Reply:
    return await chat(sim, headers=headers, stream=True, **fields)


async def eventually(condition: Any, within_s: float = 1.0) -> float:
    """Wait until `condition()`; the seconds it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < within_s, "did not come true in time"
        await asyncio.sleep(0.001)
    return loop.time() - began


@pytest.fixture
async def sim() -> Any:
    async with SimServer() as server:
        yield server
