"""Two real llama.cpp servers; one is killed (SIGKILL) in the middle of its answer, twenty times over.

Greedy decoding of one model: the second server goes on as the first would have, but for rounding in batches of another
shape, after which two texts may part. So most of the texts must be those of the undisturbed answers, and all of them
must go on from what had been seen.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from .conftest import KEY, Gateway, Llama, free_port, start_gateway, stop, until, wait_ready
from .prepare import LLAMA_SERVER, MODEL

KILLS = 20
TOKENS = 24
#: a loaded machine makes a few tokens a second
ANSWER_S = 120.0


class Server(Llama):
    """One llama.cpp server that can be killed and started again on its port."""

    def __init__(self, log: Path) -> None:
        super().__init__("llama-server", free_port())
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(LLAMA_SERVER), "-m", str(MODEL), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--alias", "smol", "--slots", "--no-ui", "-np", "2", "-c", "2048", "-t", "1"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def wait(self) -> None:
        assert self.process is not None
        wait_ready(self.process, self, "/health", lambda: self.log.read_text(errors="replace")[-2000:])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    folder = tmp_path_factory.mktemp("pair")
    servers = Server(folder / "one"), Server(folder / "other")
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            if server.process is not None:
                stop(server.process)


@pytest.fixture(scope="module")
def front(pair: tuple[Server, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("front")
    door = Gateway("gateway", free_port(), KEY, metrics_port=free_port())
    provider = {
        "provider": "llama",
        "runtime": "llamacpp",
        "baseUrls": [server.url for server in pair],
        "models": [{"apiName": "smol"}],
    }
    process = start_gateway(door, folder, OPENAI_COMPATIBLE_DATA=json.dumps([provider]))
    try:
        wait_ready(process, door, "/livez", lambda: "\n".join(door.lines))
        yield door
    finally:
        stop(process)


def request(prompt: str, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    return {
        "model": "smol",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        **more,
    }


def text_of(events: list[Any]) -> str:
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"])


def broken(front: Gateway, pair: tuple[Server, Server], body: Any, after: int) -> tuple[list[Any], str, str, Server]:
    """Ask, and kill the server that answers once `after` tokens have come: (events, text then, request id, killed)."""
    headers = {"Authorization": f"Bearer {front.key}", "Content-Type": "application/json"}
    events: list[Any] = []
    seen, killed = "", None
    with closing(http.client.HTTPConnection("127.0.0.1", front.port, timeout=ANSWER_S)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with connection.getresponse() as reply:
            assert reply.status == 200
            while line := reply.readline():
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                events.append(json.loads(line[6:]))
                if killed is None and len(events) > after:
                    seen = text_of(events)
                    killed = next((server for server in pair if server.busy_slots()), None)
                    assert killed is not None, "it was faster than the kill"
                    killed.kill()
            request_id = reply.getheader("x-request-id") or ""
    assert killed is not None
    return events, seen, request_id, killed


@pytest.mark.timeout(400)  # servers start twenty times
def test_one_complete_answer_and_one_bill_each_time(front: Gateway, pair: tuple[Server, Server]) -> None:
    chance = random.Random(11)
    same = 0
    for number in range(KILLS):
        prompt = f"Tell me a story about the number {number} and a lighthouse."
        undisturbed = front.send("POST", "/v1/chat/completions", request(prompt))
        bill = front.record(undisturbed.headers["x-request-id"])
        events, seen, request_id, killed = broken(front, pair, request(prompt), chance.randrange(1, TOKENS // 2))
        try:
            record = front.record(request_id)
            text = text_of(events)
            assert [one["choices"][0]["finish_reason"] for one in events if one["choices"]].count("length") == 1
            assert sum("role" in one["choices"][0]["delta"] for one in events if one["choices"]) == 1
            assert len({(one["id"], one["created"]) for one in events[-3:]}) == 1
            assert events[0]["id"] == events[-1]["id"]
            assert (record["outcome"], record["continued"], record["attempts"]) == ("ok", 1, 2)
            assert record["completion_tokens"] == TOKENS
            assert record["prompt_tokens"] == bill["prompt_tokens"]
            assert text.startswith(seen)
            same += text == text_of(undisturbed.events())
        finally:
            killed.start()
            killed.wait()
            seen_again(front)
    print(f"{same} of {KILLS} texts are those of the undisturbed answers")
    assert same >= KILLS // 2
    lines = [json.loads(line) for line in front.lines if line.startswith("{")]
    ids = [line["request_id"] for line in lines if line.get("route") == "/v1/chat/completions"]
    assert len(ids) == len(set(ids)) == 2 * KILLS


def seen_again(front: Gateway) -> None:
    """Both servers may be asked again."""

    def up() -> bool:
        with closing(http.client.HTTPConnection("127.0.0.1", front.metrics_port, timeout=10)) as connection:
            connection.request("GET", "/metrics")
            with connection.getresponse() as reply:
                lines = reply.read().decode().splitlines()
        return sum(line.startswith("gateway_upstream_up{") and line.endswith(" 1.0") for line in lines) == 2

    until(up, 30, lambda: "the gateway does not see it again", every_s=0.05)


def test_a_seam_that_the_runtime_itself_has_not(pair: tuple[Server, Server]) -> None:
    """What the continuation rests on: asked with the flags, the stream is what follows the last message."""
    one = pair[0]
    whole = text_of(one.send("POST", "/v1/chat/completions", request("Name three fruits.", 12)).events())
    told = whole[: len(whole) // 2].rstrip()
    body = request("Name three fruits.", 4, add_generation_prompt=False, continue_final_message=True)
    body["messages"].append({"role": "assistant", "content": told})
    events = one.send("POST", "/v1/chat/completions", body).events()
    assert not text_of(events).startswith(told)
    assert events[-1]["timings"]["cache_n"] + events[-1]["timings"]["prompt_n"] > 30
