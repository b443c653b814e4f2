"""The load generator: closed loops of requests or streams, each answer demanded byte for byte.

    python -m tests.bench.load '{"port": 8700, ...}'        # the fields of `Job`; prints one JSON object

A raw asyncio.Protocol per connection, so that it is never the limit on the other core. It also reads the CPU
clocks of the contestant and the mock, exactly at the borders of its own measuring window.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httptools
import uvloop

from . import answers, machine

_RECONNECT_S = 0.02
_AT_ONCE_BYTES = 64 << 10


@dataclass(frozen=True)
class Job:
    """One run: with `each`, that many exchanges per connection; without, as many as fit in `duration_s`."""

    port: int
    cores: Sequence[int]
    contestant: Sequence[int] = ()
    mock: Sequence[int] = ()
    connections: int = 64
    prompt_bytes: int = 1024
    stream: bool = False
    tokens: int = 100
    interval_ms: int = 0
    each: int = 0
    duration_s: float = 4.0
    warm_s: float = 0.5
    ramp_s: float = 0.0  # connections open evenly over this time
    hold: bool = False  # sample the contestant's memory while all streams are open
    grace_s: float = 10.0  # exchanges that are not complete this long after the end are lost


def request_bytes(job: Job) -> bytes:
    """The whole HTTP request of `job`."""
    body = answers.request(job.prompt_bytes, tokens=job.tokens, interval_ms=job.interval_ms, stream=job.stream)
    head = (
        f"POST {answers.PATH} HTTP/1.1\r\nHost: 127.0.0.1:{job.port}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Authorization: Bearer {answers.KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def expected_bytes(job: Job) -> bytes:
    """The body that must come back."""
    return b"".join(answers.events(job.tokens)) if job.stream else answers.completion()


def percentiles_ms(samples_s: list[float]) -> dict[str, float]:
    """`p50`, `p99` and `max` in milliseconds, `n`; empty without samples."""
    if not samples_s:
        return {}
    ordered = sorted(samples_s)
    last = len(ordered) - 1
    marks = {"p50": ordered[round(last * 0.5)], "p99": ordered[round(last * 0.99)], "max": ordered[last]}
    return {"n": len(ordered)} | {name: round(value * 1000, 3) for name, value in marks.items()}


class Client(asyncio.Protocol):
    """One connection: an exchange after the other until the run is over."""

    __slots__ = ("at", "busy", "fd", "left", "parser", "run", "sent_at", "transport")

    def __init__(self, run: "Run", left: int) -> None:
        self.run = run
        self.left = left  # exchanges still to make; negative = until the run is over
        self.parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport
        self.fd = -1
        self.busy = False
        self.at = 0
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.fd = transport.get_extra_info("socket").fileno()
        self.run.clients.add(self)
        self.send()

    def send(self) -> None:
        self.at, self.busy = 0, True
        self.left -= 1
        self.run.started += 1
        self.sent_at = time.perf_counter()
        request = self.run.request
        if len(request) > _AT_ONCE_BYTES:
            self.transport.write(request)
            return
        # Now, not at the end of uvloop's turn: the contestant would stand idle while a turn's answers are read.
        try:
            sent = os.write(self.fd, request)
        except BlockingIOError:
            sent = 0
        except OSError:  # the peer is gone; connection_lost follows
            return
        if sent < len(request):
            self.transport.write(request[sent:])

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.fail("not_http")

    def on_body(self, data: bytes) -> None:
        run, at = self.run, self.at
        if run.expected.startswith(data, at):
            self.at = at + len(data)
            if at <= run.before_first < self.at:
                run.first.append(time.perf_counter() - self.sent_at)
            run.received += len(data)
            run.pieces += 1
        else:
            run.sample = run.sample or data[:300].decode(errors="replace")
            if self.parser.get_status_code() == 200:
                self.fail("wrong_bytes")

    def on_message_complete(self) -> None:
        run = self.run
        if not self.busy:
            return
        if self.parser.get_status_code() != 200:
            self.fail(f"status_{self.parser.get_status_code()}")
        elif self.at != len(run.expected):
            self.fail("too_short")
        else:
            self.busy = False
            run.completed += 1
            if self.left and not run.over:
                if self.parser.should_keep_alive():
                    self.send()
                else:
                    run.reconnects += 1
                    self.transport.close()
                    run.connect(self.left)
            else:
                self.transport.close()
                run.finished()

    def fail(self, kind: str) -> None:
        if self.busy:
            self.busy = False
            self.run.errors[kind] += 1
            self.transport.abort()
            self.run.again(self.left)

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.clients.discard(self)
        if self.busy:
            self.fail("cut")

    def give_up(self) -> None:
        self.busy = False
        self.transport.abort()


class Run:
    """Everything the connections of one run share: the bytes, the counts, the clocks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.request = request_bytes(job)
        self.expected = expected_bytes(job)
        self.events_each = job.tokens + 2 if job.stream else 0  # the role and [DONE] are events too
        self.started = self.completed = self.received = self.pieces = self.reconnects = 0
        self.errors: Counter[str] = Counter()
        self.sample = ""  # of the first wrong answer
        #: a stream's first event tells the role: its first token comes behind it
        self.before_first = len(answers.events(1)[0]) if job.stream else 0
        self.first: list[float] = []
        self.clients: set[Client] = set()
        self.over = False
        self.open = job.connections
        self.done = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self, left: int, delay_s: float = 0.0) -> None:
        task = self.loop.create_task(self._connect(left, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, left: int, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        try:
            await self.loop.create_connection(lambda: Client(self, left), "127.0.0.1", self.job.port)
        except OSError:
            self.errors["refused"] += 1
            self.again(left - 1)

    def again(self, left: int) -> None:
        """After an error: go on on a new connection, unless there is nothing left to do."""
        if left and not self.over:
            self.connect(left, _RECONNECT_S)
        else:
            self.finished()

    def finished(self) -> None:
        self.open -= 1
        if not self.open:
            self.done.set()

    def marks(self) -> dict[str, float]:
        """Counts and clocks at this moment; the window is the difference of two."""
        return {
            "s": time.perf_counter(),
            "exchanges": self.completed,
            "events": self.received / len(self.expected) * self.events_each,
            "pieces": self.pieces,
            "contestant": machine.cpu_s(self.job.contestant),
            "mock": machine.cpu_s(self.job.mock),
            "load": time.process_time(),
        }

    async def all_streams_open(self) -> int:
        """The contestant's memory, in bytes, once every stream has answered and none is over."""
        while len(self.first) < self.job.connections and not self.errors:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        return machine.rss_bytes(self.job.contestant)

    async def measure(self) -> dict[str, object]:
        job = self.job
        result: dict[str, object] = {}
        rss_before = machine.rss_bytes(job.contestant)
        counted = job.each > 0
        if not counted:
            for i in range(job.connections):
                self.connect(-1, job.ramp_s * i / job.connections)
            await asyncio.sleep(job.warm_s)
        busy, before = machine.Busy(job.cores), self.marks()
        if counted:
            for i in range(job.connections):
                self.connect(job.each, job.ramp_s * i / job.connections)
            if job.hold:
                async with asyncio.timeout(job.grace_s):
                    result["rss_open_bytes"] = await self.all_streams_open()
                result["open_streams"] = len(self.first) - self.completed
                result["rss_idle_bytes"] = rss_before
            lasts_s = job.ramp_s + job.each * job.tokens * job.interval_ms / 1000
            await self.wait(lasts_s + job.grace_s)
        else:
            await asyncio.sleep(job.duration_s)
        window = {name: value - before[name] for name, value in self.marks().items()}
        own_s = window["contestant"] + window["mock"] + window["load"]
        result["foreign_pct"] = busy.foreign_pct(own_s)
        if not counted:
            self.over = True
            await self.wait(job.tokens * job.interval_ms / 1000 + job.grace_s)
        return result | {
            "window": {name: round(value, 6) for name, value in window.items()},
            "completed": self.completed,
            "errors": dict(self.errors),
            "sample": self.sample,
            "reconnects": self.reconnects,
            "first_ms": percentiles_ms(self.first),
        }

    async def wait(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self.done.wait()
        except TimeoutError:
            lost = self.started - self.completed - sum(self.errors.values())
            self.errors["unfinished"] += max(lost, self.open)
            self.over = True
            for client in self.clients:
                client.give_up()


async def _main(job: Job) -> None:
    print(json.dumps(await Run(job).measure()), flush=True)
    # Connections the contestant never answered have nothing more to say; leave without waiting for them.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(_main(Job(**json.loads(sys.argv[1]))))
