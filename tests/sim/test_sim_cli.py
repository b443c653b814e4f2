"""`sim serve` as a process, and the server under uvloop, which the command line runs it with."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from typing import Any

import pytest
import uvloop

from gateway.sim import SimServer

from .conftest import Reply, chat, stream

RUN = "import argparse, sys; from gateway.sim import cli; p = argparse.ArgumentParser(); cli.add_arguments(p); "
RUN += "sys.exit(cli.run(p.parse_args()))"


async def serve(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, "serve", *arguments, stdout=asyncio.subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_serves_until_told_to_stop(number: signal.Signals) -> None:
    process = await serve("--port", "0", "--engines", "2", "--model", "a", "--speed", "0", "--fault", "cut_at_token=2")
    assert process.stdout is not None
    ports = []
    for index in (1, 2):
        line = (await process.stdout.readline()).decode()
        match = re.fullmatch(rf"simulated engine {index}: http://127\.0\.0\.1:(\d+)/v1  models: a\n", line)
        assert match, line
        ports.append(int(match[1]))
    for port in ports:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert (await reader.read()).count(b"data: ") == 3
        writer.close()
    process.send_signal(number)
    assert await process.wait() == 0


async def test_unusable_arguments_are_named() -> None:
    process = await serve("--fault", "no_such=1")
    out, _ = await process.communicate()
    assert (process.returncode, b"no_such" in out) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await serve("--port", str(taken.getsockname()[1]))
        out, _ = await process.communicate()
    assert (process.returncode, out[:14]) == (1, b"cannot listen:")


def test_under_uvloop() -> None:
    async def run() -> dict[str, Reply]:
        cases: dict[str, dict[str, Any]] = {
            "plain": {},
            "reset": {"reset": True},
            "rst": {"cut_at_byte": 300, "cut_with": "rst"},
            "split": {"chunk": 1},
        }
        async with SimServer() as sim:
            replies = {name: await stream(sim, faults=faults) for name, faults in cases.items()}
            return {**replies, "whole": await chat(sim)}

    replies = uvloop.run(run())
    assert replies["split"].events[-1] == "[DONE]"
    assert replies["split"].text == replies["plain"].text
    assert (replies["reset"].status, replies["reset"].reset) == (0, True)
    assert (len(b"".join(replies["rst"].chunks)), replies["rst"].reset) == (300, True)
    assert replies["whole"].status == 200
