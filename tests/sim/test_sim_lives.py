"""An engine's deaths and starts, the age of its metrics, and the door through which a fleet is broken."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import pytest

from gateway.sim import Engine, SimServer
from gateway.sim.control import Control

from .conftest import ask, chat, eventually, stream


async def refused(sim: SimServer) -> bool:
    try:
        _, writer = await asyncio.open_connection(sim.host, sim.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def control(door: Control, path: str, body: Any = None, method: str = "POST") -> Any:
    reply = await ask(door, path, body, method=method)  # type: ignore[arg-type]  # asks by host and port
    return reply.status, json.loads(reply.body)


async def test_killed_at_a_token_everything_is_gone(sim: SimServer) -> None:
    other = asyncio.create_task(stream(sim, max_tokens=200, faults={"token_s": 0.01}))
    await eventually(lambda: sim.engine.running == 1)
    cut = await stream(sim, max_tokens=200, faults={"kill_at_token": 3, "token_s": 0.001})
    assert len([event for event in cut.events if event["choices"][0]["delta"].get("content")]) == 3
    assert (await other).events[-1] != "[DONE]"
    assert not sim.listening
    assert await refused(sim)
    assert (sim.engine.running, sim.aborted, sim.engine.generation_tokens_total) == (0, 0, 0)
    assert sim.tokens_ever[1] >= 3
    assert sim.connections_open == 0


async def test_a_revived_engine_has_the_same_port_and_a_cold_cache(sim: SimServer) -> None:
    port = sim.port
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 20}]
    cached = []
    for turn in range(4):
        usage = json.loads((await chat(sim, messages=messages)).body)["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        if turn == 1:
            sim.kill()
            await sim.revive()
            assert sim.port == port
    assert cached == [0, 208, 0, 208]


async def test_a_killed_engine_can_come_back_by_itself(sim: SimServer) -> None:
    await stream(sim, faults={"kill_at_token": 1, "down_s": 0.1})
    await eventually(lambda: not sim.listening)
    assert await refused(sim)
    assert await eventually(lambda: sim.listening) > 0.03
    assert (await chat(sim)).status == 200


async def test_a_start_takes_its_time_and_nothing_listens_meanwhile() -> None:
    async with SimServer(start_delay_s=0.2) as sim:
        assert sim.port
        assert await refused(sim)
        assert await eventually(lambda: sim.listening) > 0.1
        assert (await chat(sim)).status == 200
    async with SimServer(start_delay_s=60) as sim:
        assert await refused(sim)


async def test_metrics_trail_behind() -> None:
    async with SimServer(metrics_lag_s=0.4) as sim:
        await chat(sim)

        async def page() -> str:
            return (await ask(sim, "/metrics")).body.decode()

        counted = 'vllm:generation_tokens_total{engine="0",model_name="sim"} 8.0'
        assert counted not in await page()
        loop = asyncio.get_running_loop()
        began = loop.time()
        while counted not in await page():
            assert loop.time() - began < 5
            await asyncio.sleep(0.02)
        assert loop.time() - began > 0.3


async def test_the_control_door() -> None:
    async with SimServer() as one, SimServer(engine=Engine(speed=1.0)) as two, Control([one, two]) as door:
        status, fleet = await control(door, "/sim", method="GET")
        assert (status, [engine["url"] for engine in fleet]) == (200, [one.url, two.url])
        status, fleet = await control(door, "/sim/faults?engine=2", {"status": 429, "retry_after": 7})
        assert (status, [engine["engine"] for engine in fleet]) == (200, [2])
        assert ((await chat(one)).status, (await chat(two)).status) == (200, 429)
        await control(door, "/sim/faults", {})
        assert (await chat(two)).status == 200

        _, fleet = await control(door, "/sim/kill?engine=1")
        assert fleet[0]["listening"] is False
        assert await refused(one)
        assert not await refused(two)
        _, fleet = await control(door, "/sim/revive")
        assert [engine["listening"] for engine in fleet] == [True, True]
        assert fleet[0]["generation_tokens"] == 8
        assert (await chat(one)).status == 200
        await control(door, "/sim/kill", {"down_s": 0.05})
        await eventually(lambda: one.listening and two.listening)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/sim/faults", {"no_such": 1}, 400),
        ("/sim/faults", [], 400),
        ("/sim/kill", {"no_such": 1}, 400),
        ("/sim/kill?engine=9", None, 404),
        ("/sim/kill?engine=x", None, 400),
        ("/sim/nope", None, 404),
    ],
)
async def test_the_control_door_says_what_is_wrong(sim: SimServer, path: str, body: Any, status: int) -> None:
    async with Control([sim]) as door:
        found, answer = await control(door, path, body)
    assert (found, answer["error"]["code"]) == (status, status)
    assert sim.listening


async def test_the_command_line_has_it_all() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "sim", "serve", "--port", "0", "--speeds", "0,0.5", "--control", "0",
        "--slots", "3", "--start-delay", "0.2", "--metrics-lag", "1",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [(await process.stdout.readline()).decode() for _ in range(3)]
    door = re.fullmatch(r"control: http://127\.0\.0\.1:(\d+)/sim\n", lines[2])
    assert door, lines
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door[1]))
    writer.write(b"GET /sim HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    fleet = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
    writer.close()
    assert [engine["listening"] for engine in fleet] == [False, False]
    process.terminate()
    assert await process.wait() == 0
