"""A fleet to break: simulated engines in this process or in their own, and clients that keep asking and keep count.

The gateway in front is `stage.gateway`. A client never raises: what became of each request is an `Outcome`, and a test
says what outcomes may be.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from gateway.config import Provider
from gateway.sim import Engine, SimServer
from gateway.upstreams.upstream import Upstream
from tests.journeys.stage import CHAT, SIM_MODEL, Answer, Client, Gateway, provider

#: no request of these tests takes longer
ASK_S = 30.0


@asynccontextmanager
async def engines(count: int, *, speed: float = 0.0, **options: Any) -> AsyncIterator[list[SimServer]]:
    """`count` engines in this process; `speed` 0 is instant, 1 an H100's."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SimServer(engine=Engine(speed=speed), **options)) for _ in range(count)]


def pool(sims: Sequence[Any], **more: Any) -> Provider:
    """One provider that serves the model from all of them."""
    return provider("fleet", *(sim.url for sim in sims), **more)


def upstream_of(here: Gateway, sim: Any) -> Upstream:
    (found,) = [one for one in here.app.catalog.upstreams if one.base_url == sim.url]
    return found


def words(count: int, dice: random.Random) -> str:
    """A text of `count` tokens of the engine's, that no other begins like."""
    return "".join(f" {dice.getrandbits(48):x}"[:9].translate(_LETTERS) for _ in range(count))


_LETTERS = str.maketrans("0123456789", "ghijklmnop")


def unique(dice: random.Random, tokens: int = 20, **more: Any) -> dict[str, Any]:
    """A chat that shares no prefix with any other."""
    return {"model": SIM_MODEL, "messages": [{"role": "user", "content": words(tokens, dice)}], **more}


@dataclass
class Outcome:
    """What a client saw of one request. `status` 0: no answer at all."""

    status: int
    body: bytes = b""
    whole: bool = False  # framed to its end
    stream: bool = False
    headers: list[tuple[str, str]] = field(default_factory=list)
    began_at: float = 0.0
    head_s: float = 0.0
    took_s: float = 0.0
    prompt: str = ""  # what the last message said

    @property
    def events(self) -> list[Any]:
        return Answer(self.status, self.headers, self.body, []).events

    @property
    def text(self) -> str:
        """What the assistant said."""
        if not self.stream:
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        return "".join(
            choice["delta"].get("content") or ""
            for event in self.events
            if isinstance(event, dict) and "error" not in event
            for choice in event["choices"]
        )

    @property
    def kind(self) -> str:
        """ "done" (a whole answer), "broken" (begun and not ended well), "lost" (no answer), or the status."""
        if not self.status:
            return "lost"
        if self.status != 200:
            return str(self.status)
        good = self.whole and (not self.stream or self.body.endswith(b"data: [DONE]\n\n"))
        return "done" if good else "broken"

    @property
    def request_id(self) -> str:
        return self.header("X-Request-Id") or ""

    def header(self, name: str) -> str | None:
        return Answer(self.status, self.headers, b"", []).header(name)

    def __repr__(self) -> str:
        return f"<Outcome {self.kind} after {self.took_s:.3f} s {self.body[-300:]!r}>"


async def ask(client: Client, body: dict[str, Any], path: str = CHAT) -> Outcome:
    loop = asyncio.get_running_loop()
    outcome = Outcome(0, stream=bool(body.get("stream")), began_at=loop.time())
    outcome.prompt = body["messages"][-1]["content"] if body.get("messages") else ""
    try:
        async with asyncio.timeout(ASK_S):
            client.send("POST", path, body)
            answer = await client.head()
            outcome.head_s = loop.time() - outcome.began_at
            outcome.status, outcome.headers = answer.status, answer.headers
            answer = await client.rest(answer)
            outcome.body, outcome.whole = answer.body, answer.ended
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        pass  # what was seen so far is the outcome
    outcome.took_s = loop.time() - outcome.began_at
    return outcome


async def ask_once(here: Any, body: dict[str, Any], path: str = CHAT) -> Outcome:
    """One request on a connection of its own; `here` has a `port` and a `key`."""
    try:
        client = await Client.open(here.port, here.key)
    except ConnectionError:
        return Outcome(0, stream=bool(body.get("stream")))
    try:
        return await ask(client, body, path)
    finally:
        client.abort()


async def together(here: Any, bodies: Sequence[dict[str, Any]]) -> list[Outcome]:
    """All at the same moment, each on a connection that is already open."""
    clients = [await Client.open(here.port, here.key) for _ in bodies]
    try:
        return list(await asyncio.gather(*map(ask, clients, bodies)))
    finally:
        for client in clients:
            client.abort()


def kinds(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.kind for outcome in outcomes)


class Load:
    """Clients that ask one thing after the other, until they are told to stop."""

    def __init__(self, here: Any, clients: int, body: Callable[[int], dict[str, Any]], pause_s: float) -> None:
        self.outcomes: list[Outcome] = []
        self.asked = 0
        self._here = here
        self._body = body
        self._pause_s = pause_s
        self._stopping = False
        self._tasks = [asyncio.create_task(self._client(), name=f"client {n}") for n in range(clients)]

    async def _client(self) -> None:
        client: Client | None = None
        while not self._stopping:
            number, self.asked = self.asked, self.asked + 1
            body = self._body(number)
            if client is None:
                try:
                    client = await Client.open(self._here.port, self._here.key)
                except ConnectionError:
                    self.outcomes.append(Outcome(0, stream=bool(body.get("stream"))))
                    await asyncio.sleep(0.01)
                    continue
            outcome = await ask(client, body)
            self.outcomes.append(outcome)
            if outcome.kind == "broken" or not outcome.whole or (outcome.header("Connection") or "").lower() == "close":
                client.abort()
                client = None
            await asyncio.sleep(self._pause_s)
        if client is not None:
            client.abort()

    async def count(self, more: int, within_s: float = ASK_S) -> None:
        """Wait for `more` outcomes."""
        wanted = len(self.outcomes) + more
        async with asyncio.timeout(within_s):
            while len(self.outcomes) < wanted:  # what clients do at their end is to append
                await asyncio.sleep(0.005)

    async def stop(self) -> list[Outcome]:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        return self.outcomes

    def since(self, at: float) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.began_at >= at]


@asynccontextmanager
async def load(
    here: Any, clients: int, body: Callable[[int], dict[str, Any]], *, pause_s: float = 0.0
) -> AsyncIterator[Load]:
    running = Load(here, clients, body, pause_s)
    try:
        yield running
    finally:
        await running.stop()


class EngineProcess:
    """An engine in a process of its own: what only a kernel can do to it is done to it. Its port stays the same."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self._kept = socket.socket()  # bound and not listening, so that nobody else gets the port meanwhile
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port = int(self._kept.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "sim", "serve", "--port", str(self.port), *self._options,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(ASK_S):
            line = (await self._process.stdout.readline()).decode()
        assert re.match(rf"simulated engine 1: http://127\.0\.0\.1:{self.port}/v1", line), line

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.kill(process.pid, number)
            await process.wait()

    async def kill(self) -> None:
        """kill -9."""
        await self._end(signal.SIGKILL)

    async def __aenter__(self) -> EngineProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end(signal.SIGKILL)
        self._kept.close()


@asynccontextmanager
async def engine_processes(count: int, *options: str) -> AsyncIterator[list[EngineProcess]]:
    async with AsyncExitStack() as stack:
        made = [EngineProcess(*options) for _ in range(count)]
        await asyncio.gather(*(stack.enter_async_context(one) for one in made))
        yield made
