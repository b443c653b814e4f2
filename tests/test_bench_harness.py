"""The benchmark must be able to tell a proxy that relays from one that drops, changes or lies."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from bench import answers, load, mock, open_loop, report
from bench.session import line

ROOT = Path(__file__).parents[1]


@pytest.fixture
async def runtime() -> AsyncIterator[int]:
    """The port of the mock runtime, in this process."""
    connections: list[mock.Runtime] = []

    def accept() -> mock.Runtime:
        connections.append(mock.Runtime())
        return connections[-1]

    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for connection in connections:
        connection.transport.abort()
    await asyncio.sleep(0.01)


@pytest.fixture
async def spoiling(runtime: int) -> AsyncIterator[Callable[[Callable[[bytes], bytes]], Any]]:
    """Starts a proxy that passes each piece of an answer through a function, and closes when that returns b""."""
    async with AsyncExitStack() as stack:

        async def start(spoil: Callable[[bytes], bytes]) -> int:
            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", runtime)
                stack.callback(up_writer.transport.abort)
                stack.callback(writer.transport.abort)

                async def upwards() -> None:
                    while data := await reader.read(65536):
                        up_writer.write(data)
                    up_writer.close()

                asking = asyncio.create_task(upwards())
                while (data := await up_reader.read(65536)) and (spoiled := spoil(data)):
                    writer.write(spoiled)
                writer.close()
                await asking

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            stack.callback(server.close)
            return int(server.sockets[0].getsockname()[1])

        yield start
    await asyncio.sleep(0.01)


async def run(port: int, **fields: Any) -> dict[str, Any]:
    settings = {"connections": 2, "duration_s": 0.1, "warm_s": 0.02, "grace_s": 1.5} | fields
    result = await load.Run(load.Job(port, (0,), **settings)).measure()
    await asyncio.sleep(0.01)  # for the connections to be closed
    return result


async def test_requests_and_streams_of_a_sound_upstream_are_all_complete(runtime: int) -> None:
    plain = await run(runtime)
    assert plain["completed"] > 10
    assert plain["errors"] == {}
    streamed = await run(runtime, stream=True, tokens=7, interval_ms=5, each=2)
    assert streamed["completed"] == 4
    assert streamed["errors"] == {}
    assert streamed["window"]["events"] == 4 * 9
    large = await run(runtime, prompt_bytes=3_000_000, each=2)
    assert (large["completed"], large["errors"]) == (4, {})


async def test_the_mock_obeys_include_usage_and_chunked_bodies(runtime: int) -> None:
    body = answers.request(10, tokens=3, stream=True)[:-1] + b',"stream_options":{"include_usage":true}}'
    reader, writer = await asyncio.open_connection("127.0.0.1", runtime)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 50):
        piece = body[start : start + 50]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    writer.write(b"0\r\n\r\n")
    received = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
    writer.close()
    events = re.findall(rb"data: [^\n]*\n\n", received)
    assert events == answers.events(3, usage=True)
    assert json.loads(events[-2][6:])["usage"]["completion_tokens"] == 3


async def test_a_body_whose_head_comes_alone_is_understood(runtime: int) -> None:
    body = answers.request(100_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", runtime)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body))
    await asyncio.sleep(0.05)
    writer.write(body)
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda data: data.replace(b"tok00002", b"tok00009"), "wrong_bytes"),
        (lambda data: b"" if b"tok00003" in data else data, "cut"),
        (lambda data: data.replace(b"HTTP/1.1 200", b"HTTP/1.1 503"), "status_503"),
        (lambda data: data.replace(b"0\r\n\r\n", b""), "unfinished"),
        (lambda data: data.replace(b"e\r\ndata: [DONE]\n\n\r\n", b""), "too_short"),
    ],
    ids=["changed", "cut", "status", "no end", "no [DONE]"],
)
async def test_a_spoiled_stream_is_an_error(spoil: Callable[[bytes], bytes], kind: str, spoiling: Any) -> None:
    result = await run(await spoiling(spoil), stream=True, tokens=5, interval_ms=3, each=1)
    assert result["completed"] == 0
    assert result["errors"] == {kind: 2}


async def test_the_open_loop_counts_latency_and_errors(runtime: int, spoiling: Any) -> None:
    def go(port: int) -> Any:
        job = open_loop.Job(port, (0,), duration_s=0.2, connections=2, grace_s=1)
        return asyncio.to_thread(open_loop.measure, job)

    sound = await go(runtime)
    assert (sound["completed"], sound["errors"]) == (20, {})
    assert 0 < sound["latency_ms"]["p50"] <= sound["latency_ms"]["p99"]
    spoiled = await go(await spoiling(lambda data: data.replace(b"fox", b"cat")))
    assert spoiled["errors"] == {"wrong_bytes": 20}


def row(contestant: str, turn: int, per_s: float, **more: Any) -> dict[str, Any]:
    cores = {"contestant_pct": 90, "mock_pct": 5, "load_pct": 5, "foreign_pct": 0.0}
    marks = {"noisy": False, "harness_bound": False, "errors": {}, "attempt": 0, "round": turn}
    figures = {"figures": {"requests_per_s": per_s}}
    return {"contestant": contestant, "measure": "requests"} | cores | marks | figures | more


def test_the_table_has_medians_of_paired_ratios_and_prefers_quiet_runs() -> None:
    rows = [
        row("bare-aiohttp", 0, 100),
        row("bare-aiohttp", 1, 200),
        row("bare-aiohttp", 2, 100),
        row("gateway", 0, 10, noisy=True, foreign_pct=50.0),
        row("gateway", 0, 220, attempt=1),
        row("gateway", 1, 440),
        row("gateway", 2, 300),
    ]
    cell = report.cells(report.kept(rows))["requests_per_s"]["gateway"]
    assert (cell.median, cell.low, cell.high, cell.rounds) == (300, 220, 440, 3)
    assert cell.ratio == pytest.approx(2.2)
    text = report.tables(rows, ["bare-aiohttp", "gateway"])
    assert "300 (2.20x)" in text
    assert "INVALID" not in text.replace("INVALID: an answer", "")


def test_whoever_drops_is_invalid_and_shows_what_came() -> None:
    rows = [row("bare-aiohttp", 0, 100), row("gateway", 0, 900, errors={"cut": 3}, sample="half an answer")]
    text = report.tables(rows, ["bare-aiohttp", "gateway"])
    assert "900" not in text
    assert "INVALID gateway requests: cut 3" in text
    assert "half an answer" in line(rows[1])


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """The whole way once: processes, pinning, load, tables, JSON."""
    out = tmp_path / "results.json"
    arguments = ["--quick", "--contestants", "direct,bare-aiohttp", "--measures", "requests", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=40
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["table"]["requests_per_s"]["bare-aiohttp"]["median"] > 100
    assert all(run["errors"] == {} for run in record["runs"])
    assert "| requests/s, 64 connections" in out.with_suffix(".md").read_text()
