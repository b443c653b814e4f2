"""The data plane's upstream side: a pooled HTTP/1.1 client whose read callback is the relay.

Bytes read from a runtime are parsed (httptools, the C parser under uvicorn) and handed to the reply's sink in the
same callback: one read, one callback, one write to the client; no task wakes for an event. `Transport.send` gives a
`Reply` once there is something to say: an unstreamed answer when it is whole, a stream when its first body byte is
there, so that everything that fails earlier can still go to another upstream.

An idle connection that the runtime closed while we wrote to it is replaced once, and only if no byte of an answer had
come. All deadlines of all replies are looked at by one timer every `SWEEP_S`, instead of a timer for each request.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from gateway.errors import UpstreamGivenUp, UpstreamSilent, UpstreamUnreachable
from gateway.upstreams.connection import Connection
from gateway.upstreams.reply import Reply, StaleConnection
from gateway.upstreams.upstream import Upstream
from gateway.wire.head import HeadCache

SWEEP_S: Final = 0.05
#: an upstream that has requests and has not said a byte for so long may be gone without a word
SILENT_S: Final = 1.0


class Pool:
    """The connections of one upstream: idle ones, most recently used last, and those in use."""

    __slots__ = ("active", "heads", "idle", "idle_s", "tls", "upstream")

    def __init__(self, upstream: Upstream, idle_s: float, tls: ssl.SSLContext | None) -> None:
        self.upstream = upstream
        self.idle_s = idle_s
        self.tls = tls
        self.idle: deque[Connection] = deque()
        self.active: set[Connection] = set()
        self.heads = HeadCache()

    def keep(self, connection: Connection) -> None:
        if self.upstream.retired:
            if connection.transport is not None:
                connection.transport.abort()
            return
        connection.idle_at = monotonic()
        self.idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that closed by itself; one that was taken out of `idle` has no `idle_at`."""
        if connection.idle_at:
            connection.idle_at = 0.0
            self.idle.remove(connection)

    def take(self) -> Connection | None:
        """The most recently used connection that is still fresh."""
        while self.idle:
            connection = self.idle.pop()
            idle_at, connection.idle_at = connection.idle_at, 0.0
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            if monotonic() - idle_at >= self.idle_s:
                transport.abort()
                continue
            return connection
        return None

    async def dial(self) -> Connection:
        """Open a connection. Raises UpstreamUnreachable with the reason in words."""
        upstream = self.upstream
        loop = asyncio.get_running_loop()
        timeout_s = upstream.timeouts.connect_s
        if not upstream.dialling:
            upstream.dialling_at = monotonic()
        upstream.dialling += 1
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    upstream.address,
                    upstream.port,
                    ssl=self.tls,
                    server_hostname=upstream.host if self.tls is not None else None,
                )
            upstream.dialling_at = monotonic()
        except TimeoutError:
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: no connection to {upstream.place} "
                f"within {timeout_s:g} s (connect timeout)",
                status=504,
                code="upstream_connect_timeout",
            ) from None
        except ssl.SSLError as error:
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: TLS with {upstream.place} failed: {_why(error)}"
            ) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: {upstream.place}: {_why(error)}"
            ) from error
        finally:
            upstream.dialling -= 1
        if connection.transport is None or connection.transport.is_closing():
            raise UpstreamUnreachable(
                f"provider {upstream.provider!r} is unreachable: {upstream.place} closed the connection at once"
            )
        return connection


def _why(error: OSError | UnicodeError) -> str:
    """The reason in words, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "handshake error").replace("_", " ").lower()
    if isinstance(error, OSError):
        if error.errno is not None and error.errno > 0:  # the loops put addresses and call names into `strerror`
            return os.strerror(error.errno).lower()
        if error.strerror:
            return error.strerror.lower()
    if isinstance(error, ConnectionError) and not error.args:
        return "connection reset"  # in the TLS handshake; the loops raise it without a word
    return str(error).lower() or type(error).__name__


class Transport:
    """All upstream connections of this process. `start` it inside the running loop, `close` it at the end.

    Idle connections of an upstream that is `retired` are closed, and its pool goes with its last answer.
    `tls` is the context for https upstreams; by default the system's trust store, with host names checked.
    """

    def __init__(self, idle_s: float = 4.0, tls: ssl.SSLContext | None = None) -> None:
        self._idle_s = idle_s
        self._pools: dict[Upstream, Pool] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tls = tls
        self._closed = False
        #: told of an upstream that is silent, as long as it is
        self.on_silent: Callable[[Upstream], None] | None = None

    async def send(self, upstream: Upstream, head: bytes, body: bytes) -> Reply:
        """Send one request (`head` ends with its empty line) and wait until the client could be answered.

        Raises UpstreamUnreachable (nothing was sent), UpstreamBroken or UpstreamTimeout. Cancelled at any point, it
        leaves no connection behind. The caller closes the Reply.
        """
        pool = self._pools.get(upstream) or self._open_pool(upstream)
        connection = pool.take()
        if connection is None:
            connection = await pool.dial()
        while True:
            if self._closed:  # while it was dialled
                connection.abort()
                raise UpstreamGivenUp("the gateway is shutting down", status=503)
            reply = connection.begin(head, body)
            pool.active.add(connection)
            try:
                await reply.ready()
            except StaleConnection:
                connection = await pool.dial()  # a fresh one: it cannot be stale, so this loop turns once
                continue
            except BaseException:
                reply.close()
                raise
            return reply

    def counts(self, upstream: Upstream) -> tuple[int, int]:
        """(connections in use, idle connections) of an upstream."""
        pool = self._pools.get(upstream)
        return (len(pool.active), len(pool.idle)) if pool is not None else (0, 0)

    def give_up(self, upstream: Upstream) -> int:
        """Fail what `upstream` has not begun to answer: it answers no probes either. How many there were."""
        pool = self._pools.get(upstream)
        waiting = [one for one in pool.active if one.reply is not None and not one.reply.first_byte_at] if pool else []
        for connection in waiting:
            reply = connection.reply
            connection.abort()
            if reply is not None:
                reply.fail(UpstreamSilent(f"provider {upstream.provider!r} answers nothing any more"))
        return len(waiting)

    def start(self) -> None:
        self._sweep()

    @property
    def idle_s(self) -> float:
        """How long an idle connection is kept."""
        return self._idle_s

    @idle_s.setter
    def idle_s(self, idle_s: float) -> None:
        self._idle_s = idle_s
        for upstream, pool in self._pools.items():
            pool.idle_s = self._idle_at(upstream)

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for pool in self._pools.values():
            for connection in [*pool.active]:
                reply = connection.reply
                connection.abort()
                if reply is not None:
                    reply.fail(UpstreamGivenUp("the gateway is shutting down"))
            while pool.idle:
                connection = pool.idle.pop()
                connection.idle_at = 0.0
                connection.abort()

    def _open_pool(self, upstream: Upstream) -> Pool:
        tls = None
        if upstream.scheme == "https":
            tls = self._tls = self._tls or ssl.create_default_context()
        pool = self._pools[upstream] = Pool(upstream, self._idle_at(upstream), tls)
        return pool

    def _idle_at(self, upstream: Upstream) -> float:
        """Below the runtime's own limit, or we would write into connections that it is just closing."""
        return min(self._idle_s, max(0.5, upstream.runtime.idle_s - 1.0))

    def _sweep(self) -> None:
        if self._closed:
            return
        self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        now = monotonic()
        gone = []
        for pool in self._pools.values():
            silent = heard = False
            for connection in list(pool.active):
                reply = connection.reply
                if reply is None:
                    continue
                if name := reply.overdue(now):
                    connection.expire(reply, name)
                elif reply.received:
                    heard = heard or now - reply.moved_at < SILENT_S
                else:
                    silent = silent or now - reply.sent_at > SILENT_S
            if silent and not heard and self.on_silent is not None:
                self.on_silent(pool.upstream)
            idle = pool.idle
            retired = pool.upstream.retired
            while idle and (retired or now - idle[0].idle_at >= pool.idle_s):
                connection = idle.popleft()
                connection.idle_at = 0.0
                if connection.transport is not None:
                    connection.transport.abort()
            if retired and not pool.active and not pool.upstream.dialling:  # else one more comes into use
                gone.append(pool.upstream)
        for upstream in gone:
            del self._pools[upstream]
