"""Listener: an address and its connections, which can die as a process dies and come back to the same port."""

from __future__ import annotations

import asyncio
import socket
import ssl as tls
import time
from collections import deque
from collections.abc import Mapping
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self

from gateway.sim.connection import Connection, Received
from gateway.sim.faults import NONE, Faults
from gateway.sim.runtimes import RUNTIMES, Runtime


class Listener:
    """Listens from `start` to `stop`, unless it was killed meanwhile. Who derives from it answers requests.

    The port stays ours while nothing listens: a bound socket that does not listen refuses connections, as the port of
    a dead process does, and no other socket of this machine can be given its number.
    """

    #: when an idle connection is closed; None: never
    keep_alive_s: float | None = 5.0
    runtime: Runtime = RUNTIMES["vllm"]

    def __init__(self, host: str, port: int, ssl: tls.SSLContext | None = None, keep: int = 0) -> None:
        self.host = host
        self.port = port
        self.requests: deque[Received] = deque(maxlen=keep)
        self.requests_total = 0
        self.connections_total = 0
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start
        self._ssl = ssl
        self._bound: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._closing: asyncio.Server | None = None
        self._faults = NONE
        self._faulted = 0
        self._connections: set[Connection] = set()
        self._all_lost = asyncio.Event()
        self._all_lost.set()
        self._common: tuple[int, bytes] = (0, b"")

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
        self._bound = bound
        self.port = bound.getsockname()[1]
        await self.listen()

    async def listen(self) -> None:
        if self._server is None:
            if self._closing is not None:  # uvloop gives the port free a turn of the loop later
                await self._closing.wait_closed()
            self._server = await self.loop.create_server(
                lambda: Connection(self), self.host, self.port, ssl=self._ssl, backlog=4096
            )

    def drop(self) -> None:
        """Be gone as after kill -9: nothing listens, every connection is closed with what was not sent yet."""
        if self._server is not None:
            self._server.close()
            self._closing, self._server = self._server, None
        for connection in list(self._connections):
            connection.transport.abort()

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        self.drop()
        await self._all_lost.wait()
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, value: Faults | Mapping[str, Any]) -> None:
        self._faults = value if isinstance(value, Faults) else NONE.merged(value)
        self._faulted = 0

    @property
    def listening(self) -> bool:
        return self._server is not None

    @property
    def root(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._ssl else 'http'}://{host}:{self.port}"

    @property
    def connections_open(self) -> int:
        return len(self._connections)

    # for connections

    def answer(self, connection: Connection, received: Received) -> None:
        raise NotImplementedError

    def opened(self, connection: Connection) -> int:
        self._connections.add(connection)
        self._all_lost.clear()
        self.connections_total += 1
        return self.connections_total

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        now = self.loop.time()
        for received in self.requests:
            if received.connection == connection.number:
                received.closed_at = now
        if not self._connections:
            self._all_lost.set()

    def common_headers(self) -> bytes:
        now = int(time.time())
        if self._common[0] != now:
            date = b"date: %b\r\n" % formatdate(now, usegmt=True).encode() if self.runtime.dated else b""
            self._common = (now, date + self.runtime.headers)
        return self._common[1]
