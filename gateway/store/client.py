"""The Store: one call in, one answer or StoreAway out.

A request can spare a store a few milliseconds and no more, so: a call that is not answered in `REQUEST_TIMEOUT_S` is
given up, nothing is tried twice, and after a few failures in a row the breaker opens and calls fail at once, until the
heartbeat finds the store well again. Who calls must have an answer of its own to StoreAway.

A call in flight is never cancelled: it runs in a task of its own, and a caller that is cancelled or out of time only
stops waiting. (A Redis connection is a queue of answers: one that was not read goes to whoever asks next.) What is
abandoned before it was sent is not sent at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from redis import exceptions

from gateway.metrics import StoreSeries
from gateway.store.address import Address, parse
from gateway.store.breaker import Breaker
from gateway.store.connections import (
    BACKGROUND_CALLS,
    BACKGROUND_SOCKET_TIMEOUT_S,
    REQUEST_CALLS,
    REQUEST_SOCKET_TIMEOUT_S,
    Connections,
)
from gateway.store.scripts import Script

if TYPE_CHECKING:  # it needs POSIX; a store somewhere else does not
    from gateway.store.embedded import Embedded

_log = logging.getLogger("gateway.store")

#: what a request waits for the store, at most
REQUEST_TIMEOUT_S: Final = 0.04
PROBE_EVERY_S: Final = 0.5
#: what the answer to a probe may take: a new connection, perhaps over TLS, is part of it
PROBE_TIMEOUT_S: Final = 0.25
#: what calls in flight are given when the store is closed
CLOSE_S: Final = 0.5
#: a loop that wakes later than this may have the answer waiting unread
LATE_S: Final = 0.005

#: error replies that say "not now": the store is there and cannot be used. redis-py knows these by class ...
_UNUSABLE: Final = (
    exceptions.AuthenticationError,
    exceptions.BusyLoadingError,
    exceptions.ClusterError,
    exceptions.NoPermissionError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
#: ... and leaves the code in the text of these
_UNUSABLE_CODES: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ")

Argument = bytes | str | int | float


class StoreAway(Exception):
    """The store did not answer, or would not. `kind` is a label: open (not asked), busy (never had its turn),
    timeout, connection, unusable (it said so).
    """

    def __init__(self, kind: str) -> None:
        super().__init__(f"the store is away ({kind})")
        self.kind = kind


class StoreError(Exception):
    """The store answered with an error: the command or the script is wrong. Never a reason to open the breaker."""


class _Call:
    """One call. `sent`: it had its turn on a connection. `abandoned`: nobody waits for it any more.

    `then`: a command to follow on the same connection; `result` is then both answers, the second perhaps an exception.
    """

    __slots__ = ("abandoned", "command", "error", "result", "script", "sent", "then")

    def __init__(self, command: tuple[Any, ...], script: Script | None, then: tuple[Any, ...] = ()) -> None:
        self.command = command
        self.script = script
        self.then = then
        self.sent = False
        self.abandoned = False
        self.result: Any = None
        self.error: Exception | None = None


class Store:
    """The shared state of all gateways. Make it anywhere, `start` it on the loop that uses it, `close` it there.

    `on_change` callbacks are told True when the store can be used (the first time too), False when it no longer can;
    they run on the loop, are synchronous and must not raise.
    """

    def __init__(self, address: Address, *, server: Embedded | None = None) -> None:
        self.address = address
        self.series = StoreSeries()  # what `Metrics.store` shows
        self.on_change: list[Callable[[bool], None]] = []
        self._server = server
        self._breaker = Breaker(monotonic())
        self._kind = "not asked yet"  # the last failure's
        self._requests: Connections | None = None
        self._background: Connections | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, setting: str, redis_url: str, data_dir: Path) -> Store | None:
        """The store that the setting names ("auto", "embedded", "off"), not started. None: off, or, which is logged,
        none to be had on this platform. ValueError if `redis_url` is none.
        """
        if setting == "off":
            return None
        if redis_url and setting == "auto":
            return cls(parse(redis_url))
        try:
            from gateway.store.embedded import Embedded, binary  # here: it needs POSIX
        except ImportError:
            program = None
        else:
            program = binary()
        if program is None:
            _log.warning("there is no embedded store for this platform: limits and usage are this process's own")
            return None
        server = Embedded(data_dir, program)
        return cls(server.address, server=server)

    def __repr__(self) -> str:
        return f"<Store {self.address} {'up' if self.up else 'away'}>"

    @property
    def up(self) -> bool:
        """The breaker is closed: a call has a chance."""
        return self._breaker.closed

    @property
    def trouble(self) -> str:
        """Why the store cannot be used, in words for an operator; "" while it can."""
        if self.up:
            return ""
        for_s = monotonic() - self._breaker.changed_at
        return f"the store at {self.address} is away ({self._kind}) for {for_s:.0f} s"

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the embedded server if there is one, and look once. A store that is away is no error: it is said."""
        if self._server is not None:
            await self._server.start()
        self._requests = Connections(self.address, REQUEST_CALLS, REQUEST_SOCKET_TIMEOUT_S)
        self._background = Connections(self.address, BACKGROUND_CALLS, BACKGROUND_SOCKET_TIMEOUT_S)
        if not await self._probe():
            _log.warning("the store at %s is away (%s)", self.address, self._kind)
        self._heartbeat = asyncio.create_task(self._beat(), name="store heartbeat")

    async def close(self) -> None:
        """Let calls in flight end, close the connections, stop the embedded server. Calls then raise StoreAway."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.wait((self._heartbeat,))
        self._breaker = Breaker(monotonic())
        self._kind = "closed"
        self.series.up.value = 0
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for connections in (self._requests, self._background):
            if connections is not None:
                await connections.close()
        if self._tasks:  # their connections are gone, so they end now
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        if self._server is not None:
            await self._server.close()

    # -- calls --------------------------------------------------------------------------------------------------

    def key(self, *parts: str) -> str:
        """The name of a key. All keys share one hash tag: a script may then use any of them on a Cluster."""
        if any(":" in part or "%" in part for part in parts):  # ("a:b", "c") and ("a", "b:c") are two keys
            parts = tuple(part.replace("%", "%25").replace(":", "%3A") for part in parts)
        return "{llm-gateway}:" + ":".join(parts)

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Argument] = (),
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Any:
        """Run a script in one round trip (two where the server forgot it) and give its answer, text as bytes.

        Raises StoreAway at once while the breaker is open, or after `timeout_s`; the script may have run then.
        StoreError if the script itself fails. A `timeout_s` above 0.25 goes over connections of its own, so that
        slow background work takes none from requests.
        """
        return await self._ask(_Call(("EVALSHA", script.sha, len(keys), *keys, *args), script), timeout_s)

    async def call(self, *command: Argument, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
        """One plain command, under the rules of `run`. Answers as redis-py shapes them: PING is True,
        HGETALL a dict; most are as they came, text as bytes.
        """
        return await self._ask(_Call(command, None), timeout_s)

    async def run_synced(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument] = (), *, sync_s: float, timeout_s: float
    ) -> tuple[Any, bool | None]:
        """The same for a script that writes, and whether its writes, and so all before them, are on the server's disk
        within `sync_s` (WAITAOF).

        None: it cannot tell (before Redis and Valkey 7.2, or without an append-only file; a Cluster is not asked).
        `timeout_s` is for both together.
        """
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        if self.address.shape == "cluster":  # redis-py has no one connection to send both on
            return await self._ask(_Call(command, script), timeout_s), None
        wait = ("WAITAOF", 1, 0, int(sync_s * 1000))
        answer, synced = await self._ask(_Call(command, script, wait), timeout_s)
        return answer, None if isinstance(synced, Exception) else synced[0] >= 1

    async def _ask(self, call: _Call, timeout_s: float) -> Any:
        if not self._breaker.closed:
            self._count("open")
            raise StoreAway("open")
        return await self._send(call, timeout_s)

    async def _send(self, call: _Call, timeout_s: float) -> Any:
        connections = self._requests if timeout_s <= REQUEST_SOCKET_TIMEOUT_S else self._background
        assert connections is not None, "the store was not started"
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._perform(call, connections), name="store call")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        due_at = loop.time() + timeout_s
        try:
            await asyncio.wait((task,), timeout=timeout_s)
            if not task.done() and loop.time() - due_at > LATE_S:
                # It was this loop that stood still: the answer may be in the socket, unread.
                await asyncio.wait((task,), timeout=LATE_S)
        finally:
            call.abandoned = not task.done()
        if call.abandoned and not call.sent:  # our own queue: it says nothing about the store
            self._count("busy")
            raise StoreAway("busy")
        if call.abandoned:
            raise self._failed("timeout")
        if call.error is None:
            self._breaker.succeeded()
            return call.result
        raise self._translated(call.error)

    async def _perform(self, call: _Call, connections: Connections) -> None:
        """The call itself. Never cancelled and never raises: its outcome is in `call`."""
        async with connections.slots:
            if call.abandoned:
                return
            call.sent = True
            began_at = monotonic()
            self.series.round_trips += 1
            try:
                try:
                    call.result = await _executed(connections.client, call.command, call.then)
                except exceptions.NoScriptError:
                    if call.script is None or call.abandoned:
                        raise
                    self.series.round_trips += 1
                    command = ("EVAL", call.script.text, *call.command[2:])
                    call.result = await _executed(connections.client, command, call.then)
            except Exception as error:
                call.error = error
            else:
                self.series.latency.observe(monotonic() - began_at)

    def _translated(self, error: Exception) -> Exception:
        """redis-py's and the system's errors as ours, counted."""
        if isinstance(error, exceptions.TimeoutError | TimeoutError):
            return self._failed("timeout", error)
        if isinstance(error, _UNUSABLE) or str(error).startswith(_UNUSABLE_CODES):
            return self._failed("unusable", error)
        if isinstance(error, exceptions.ConnectionError | OSError | exceptions.RedisClusterException):
            return self._failed("connection", error)
        if not isinstance(error, exceptions.RedisError):  # uvloop's RuntimeError of a transport that was just closed
            _log.debug("the store's client failed: %s: %s", type(error).__name__, error)
            return self._failed("connection", error)
        self._breaker.succeeded()
        self._count("reply")
        ours = StoreError(str(error))
        ours.__cause__ = error
        return ours

    def _failed(self, kind: str, cause: Exception | None = None) -> StoreAway:
        self._count(kind)
        self._kind = kind
        if self._breaker.failed(monotonic()):
            reason = f": {cause}" if kind == "unusable" else ""
            _log.warning("the store at %s is away (%s%s)", self.address, kind, reason)
            self._tell(False)
        away = StoreAway(kind)
        away.__cause__ = cause
        return away

    def _count(self, kind: str) -> None:
        self.series.errors[kind] = self.series.errors.get(kind, 0) + 1

    # -- the heartbeat ------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Find out without traffic that the store went, or that it is back."""
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            await self._probe()

    async def _probe(self) -> bool:
        """True if the store answers, and, if it was away, takes a write as fast as a request needs it."""
        key = self.key("probe")
        try:
            await self._send(_Call(("GET", key), None), PROBE_TIMEOUT_S)
            if not self.up:
                await self._send(_Call(("SET", key, "1", "PX", 60_000), None), REQUEST_TIMEOUT_S)
        except (StoreAway, StoreError):
            return False
        away_at = self._breaker.changed_at
        if self._breaker.probed(monotonic()):
            _log.info("the store at %s can be used, after %.1f s", self.address, monotonic() - away_at)
            self._tell(True)
        return True

    def _tell(self, up: bool) -> None:
        self.series.up.value = int(up)
        for callback in self.on_change:
            try:
                callback(up)
            except Exception as error:
                _log.error("a listener of the store failed: %s", type(error).__name__)


async def _executed(client: Any, command: tuple[Any, ...], then: tuple[Any, ...]) -> Any:
    if not then:
        return await client.execute_command(*command)
    async with client.pipeline(transaction=False) as both:
        both.execute_command(*command)
        both.execute_command(*then)
        first, second = await both.execute(raise_on_error=False)
    if isinstance(first, Exception):
        raise first
    return first, second
