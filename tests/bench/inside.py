"""What a request or an event costs inside the gateway, without sockets: `python -m tests.bench.inside`.

The whole gateway in this process, its client and upstream transports replaced by ones that write nowhere, so that what
is measured is our own code, aiohttp's and the loop's: no system call but the journal's, no other core, little noise.
CPU time of this process, threads included (the shipper's among them); the embedded store's own is shown apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from gateway.app import App
from gateway.config import load
from gateway.identity.keys import KeyRing
from gateway.log import RequestLog
from gateway.server import GatewayServer, new_event_loop, quiet_collector
from gateway.upstreams.connection import Connection
from gateway.upstreams.transport import Pool

from . import answers, contestants
from . import load as generator

REQUEST = generator.request_bytes(generator.Job(8700, ()))
STREAM = generator.request_bytes(generator.Job(8700, (), stream=True))
EVENTS = 100


class Nowhere(asyncio.Transport):
    """A transport whose writes are handed to `on_write`."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__()
        self.on_write = on_write
        self.closing = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.on_write(data)

    def writelines(self, parts: Any) -> None:
        self.on_write(b"".join(parts))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 50000), "socket": self}.get(name, default)

    family = socket.AF_UNIX  # as a socket: nothing to set

    def setsockopt(self, *options: Any) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        raise AssertionError("nothing is ever full here")

    def resume_reading(self) -> None: ...


class Upstreams:
    """Connections to nowhere, which answer like the mock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        body = answers.completion()
        head = b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: %b\r\n"
        self.whole = head % b"application/json" + b"content-length: %d\r\n\r\n" % len(body) + body
        chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in answers.events(EVENTS, usage=True)]
        chunks[0] = head % b"text/event-stream; charset=utf-8" + b"transfer-encoding: chunked\r\n\r\n" + chunks[0]
        chunks[-1] += b"0\r\n\r\n"
        self.chunks = chunks

    async def dial(self, pool: Pool) -> Connection:
        connection = Connection(pool)

        def written(data: bytes) -> None:
            if b'"stream":true' in data:
                self.loop.call_soon(self.stream, connection, 0)
            else:
                self.loop.call_soon(connection.data_received, self.whole)

        connection.connection_made(Nowhere(written))
        return connection

    def stream(self, connection: Connection, at: int) -> None:
        connection.data_received(self.chunks[at])
        if at + 1 < len(self.chunks):
            self.loop.call_soon(self.stream, connection, at + 1)


class Client:
    """One connection that asks again as soon as it is answered."""

    def __init__(self, run: Run, server: GatewayServer) -> None:
        self.run = run
        self.protocol = server()
        self.protocol.connection_made(Nowhere(self.answered))

    def ask(self) -> None:
        self.protocol.data_received(self.run.request)

    def answered(self, data: bytes) -> None:
        run = self.run
        if run.request is STREAM:
            if not data.endswith(b"0\r\n\r\n"):
                return
        elif not data.startswith(b"HTTP/1.1 200"):
            raise AssertionError(data)
        run.done += 1
        if run.done + run.at_once <= run.count:
            run.loop.call_soon(self.ask)
        elif run.done == run.count:
            run.ended.set()


class Run:
    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes, count: int, at_once: int) -> None:
        self.loop = loop
        self.request = request
        self.count = count
        self.at_once = at_once
        self.done = 0
        self.ended = asyncio.Event()


async def measure(
    name: str, kind: str, count: int, rounds: int, at_once: int, more: dict[str, str]
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(prefix="gateway-inside-") as folder, open(os.devnull, "wb") as null:
        plan = contestants.PLANS[name](contestants.Place(8700, 9, Path(folder), 0))
        config = load({**plan.environment, **more})
        app = App(config, KeyRing.open(config.data_dir, config.api_keys))
        if app.log is not None:
            app.log = RequestLog(null.fileno())
        upstreams = Upstreams(loop)
        Pool.dial = lambda pool: upstreams.dial(pool)  # type: ignore[method-assign]
        app.prober.due = lambda now: []  # type: ignore[method-assign]  # nobody is there to be found well
        await app.start()
        server = GatewayServer(app.handle, app.malformed, handler_cancellation=True, access_log=None,
                               auto_decompress=False, keepalive_timeout=30.0)  # fmt: skip
        quiet_collector()
        request = STREAM if kind == "streams" else REQUEST
        clients: list[Client] = []
        figures: list[float] = []
        store_us: list[float] = []
        calls = 0
        for turn in range(rounds + 1):
            run = Run(loop, request, count if turn else count // 10 + at_once, at_once)
            if not clients:
                clients = [Client(run, server) for _ in range(at_once)]
                await asyncio.sleep(0)
            children = psutil.Process().children()
            store_s = sum(sum(one.cpu_times()[:2]) for one in children)
            trips = app.store.series.round_trips if app.store is not None else 0
            began_s = time.process_time()
            for client in clients:
                client.run = run
                client.ask()
            await run.ended.wait()
            if app.shipper is not None and app.store is not None:
                while app.shipper._own.read != app.journal.position:  # type: ignore[union-attr]
                    await asyncio.sleep(0.02)
            used_s = time.process_time() - began_s
            if turn:
                figures.append(used_s * 1e6 / count)
                store_us.append((sum(sum(one.cpu_times()[:2]) for one in children) - store_s) * 1e6 / count)
                calls += (app.store.series.round_trips if app.store is not None else 0) - trips
        for client in clients:
            client.protocol.connection_lost(None)
        await asyncio.sleep(0.01)
        await app.stop()
        per = EVENTS + 3 if kind == "streams" else 1
        return {
            "min_us": min(figures) / per,
            "median_us": statistics.median(figures) / per,
            "store_us": statistics.median(store_us) / per,
            "trips": calls / (count * rounds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contestants", default="gateway,gateway-full")
    parser.add_argument("--kinds", default="requests,streams")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--env", default="{}", help="more of the environment, as a JSON object")
    given = parser.parse_args()
    logging.disable()
    for kind in given.kinds.split(","):
        for name in given.contestants.split(","):
            count = given.count if kind == "requests" else given.count // EVENTS
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                found = runner.run(
                    measure(name, kind, count, given.rounds, min(given.at_once, count), json.loads(given.env))
                )
            figures = "  ".join(f"{key} {value:7.3f}" for key, value in found.items())
            print(f"{kind:9} {name:13} {figures}", flush=True)


if __name__ == "__main__":
    main()
