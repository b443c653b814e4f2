"""Listeners, signals and drain: runs an App until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any, Final, cast

import aiohttp
from aiohttp import http_parser, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_writer import StreamWriter
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

from gateway import log
from gateway.answer import Sent, send_error
from gateway.app import App
from gateway.config import Config, Listen
from gateway.errors import BadRequest, GatewayError, VersionNotSupported
from gateway.fleet.reload import Reloader
from gateway.identity.keys import KeyRing
from gateway.welcome import furnish, greeting

_log = logging.getLogger("gateway.server")

MIN_AIOHTTP: Final = (3, 14, 4)
#: Work left after an error event was written: time for the bytes to leave before the sockets are closed.
LAST_WORDS_S: Final = 0.5
#: what the kernel holds of an answer that its client does not read, at most twice this
SEND_BYTES: Final = 128 * 1024
#: whoever asked /readyz no longer ago than this watches it
WATCHED_S: Final = 30.0
#: so many more objects than before, and the collector looks: those of a hundred requests under way, not of ten
COLLECT_EVERY: Final = 10_000


class ClientProtocol(RequestHandler):
    """aiohttp's server side of one client connection, with four changes.

    Requests are handled without a task of their own (`start`). `on_pause` and `on_resume` are called when the
    client's buffer is full, and when there is room again. Errors that arise before a request exists (the parser's)
    are answered in our own shape and show no byte of what was sent. The kernel's send buffer has a bound.
    """

    __slots__ = ("on_pause", "on_resume")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        with contextlib.suppress(OSError):  # it may be gone already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)

    async def start(self) -> None:
        """Answer this connection's requests, one after the other, in the connection's own task.

        aiohttp makes a task for each request, so that each has its own context variables. Nothing here uses any, and
        the further task with its two wake-ups is a tenth of what a small request costs (docs/decisions.md).
        """
        loop = self._loop
        manager = cast("GatewayServer", self._manager)
        handler = self._request_handler
        make_request = self._request_factory
        assert manager is not None
        assert handler is not None
        assert make_request is not None
        while not self._force_close:
            if not self._messages:
                # An idle connection keeps nothing of the request before, whose body may be large.
                message = payload = request = response = None
                self._waiter = loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            message, payload = self._messages.popleft()
            if self._parser is not None:
                self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            manager.requests_count += 1
            answer = handler
            if isinstance(message, _ErrInfo):
                answer = self._make_error_handler(message)
                message = ERROR
            if manager.draining:
                message = message._replace(should_close=True)
            # The task is no local: a cancelled one keeps its exception, and that this frame, with all that was sent.
            request = make_request(message, payload, self, StreamWriter(self, loop), self._task_handler)  # type: ignore[arg-type]
            self._current_request = request
            self._request_in_progress = True
            try:
                response = await answer(request)
                if type(response) is not Sent or self._upgraded:
                    response, client_gone = await self.finish_response(request, response, None)
                    if client_gone:
                        break
            except BaseException:
                self.force_close()
                raise
            finally:
                self._current_request = None
                self._request_in_progress = False
                if self._handler_waiter is not None:
                    self._handler_waiter.set_result(None)
                request._task = None  # type: ignore[assignment]  # breaks the cycle request -> task -> this frame
            self._keepalive = bool(response.keep_alive)
            if not payload.is_eof():
                await self._linger(payload)
            if not self._keepalive or self._close or self._force_close:
                break
            close_at = loop.time() + self._keepalive_timeout
            self._next_keepalive_close_time = close_at
            if self._keepalive_handle is None:
                self._keepalive_handle = loop.call_at(close_at, self._process_keepalive)
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _linger(self, payload: StreamReader) -> None:
        """Read and drop what is left of a request's body, for a while: closing at once would reset the connection
        and could take the answer from a client that is still sending.
        """
        try:
            async with asyncio.timeout(self._lingering_time):
                while not payload.is_eof() and not self._force_close:
                    await payload.readany()
        except TimeoutError:
            self._keepalive = False

    def whole_body(self, payload: StreamReader) -> bytes | None:
        """A request's body if it has come to its end, None while it is still being sent.

        What `payload.read_nowait()` does in six calls, for the body that came in one piece.
        """
        if not payload.is_eof():
            return None
        if type(payload) is StreamReader and len(payload._buffer) == 1 and not payload._buffer_offset:
            body: bytes = payload._buffer[0]
            return body
        return payload.read_nowait(-1)

    def spoilt(self) -> bool:
        """Whether what the client sent has ceased to be HTTP. aiohttp queues that as the next message to answer, and
        never tells the reader of a body that is cut by it.
        """
        return any(isinstance(message, _ErrInfo) for message, _ in self._messages)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Asked by the body's reader whenever it has room, which is always; there is work only after a pause."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.on_pause is not None:
            self.on_pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_resume is not None:
            self.on_resume()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        error: GatewayError
        if not isinstance(exc, HttpProcessingError):
            # Ours are rendered by the errors middleware; what reaches this is a fault outside every handler.
            _log.error("a request failed outside its handler: %s", type(exc).__name__)
            error = GatewayError("the gateway failed on this request")
        elif "Invalid HTTP version" in (exc.message or ""):
            error = VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are spoken here")
        else:
            error = BadRequest("this is not a valid HTTP request", code="malformed_http")
        server = self._manager
        if isinstance(server, GatewayServer):
            server.malformed(error.status)
        return send_error(request, error, None, close=True)


class GatewayServer(web.Server):
    """aiohttp's low-level server, making our protocol. `malformed` is told of requests that never became one; while
    `draining`, each answer is the last of its connection and says so.
    """

    def __init__(self, handler: Any, malformed: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self.malformed = malformed
        self.draining = False

    def __call__(self) -> ClientProtocol:
        return ClientProtocol(self, loop=self._loop, **self._kwargs)


def require_aiohttp() -> None:
    """Refuse to start on an aiohttp that is known to be unsafe or slow. Raises RuntimeError."""
    version = tuple(int(part) for part in aiohttp.__version__.split(".")[:3] if part.isdigit())
    if version < MIN_AIOHTTP:
        wanted = ".".join(map(str, MIN_AIOHTTP))
        raise RuntimeError(f"aiohttp {aiohttp.__version__} is too old: {wanted} or newer is needed")
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise RuntimeError("aiohttp runs without its C parser: reinstall it from a binary wheel")


class Listeners:
    """The data listener and the metrics listener of an App."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._servers: list[tuple[GatewayServer, asyncio.Server]] = []
        self.address: Listen | None = None
        self.metrics_address: Listen | None = None

    async def bind(self) -> None:
        """Take the addresses, and let nobody in yet. Raises OSError with the address in its text."""
        config = self._app.config
        self.address = await self._bind(config.listen, self._app.handle)
        if config.metrics_listen is not None:
            self.metrics_address = await self._bind(config.metrics_listen, self._app.handle_metrics)

    async def open(self) -> None:
        """Let clients in."""
        for _, listening in self._servers:
            await listening.start_serving()

    async def _bind(self, listen: Listen, handler: Any) -> Listen:
        server = GatewayServer(
            handler,
            self._app.malformed,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=self._app.config.keepalive_timeout_s,
            lingering_time=2.0,
        )
        loop = asyncio.get_running_loop()
        try:
            listening = await loop.create_server(server, listen.host, listen.port, backlog=4096, start_serving=False)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {listen}: {error.strerror or error}") from error
        self._servers.append((server, listening))
        host, port = listening.sockets[0].getsockname()[:2]
        return Listen(host, port)

    def last_answers(self) -> None:
        """From now on each answer is the last of its connection; new ones are taken."""
        self._servers[0][0].draining = True

    def stop_accepting(self) -> None:
        """Take no new client connections. The metrics listener stays: its /readyz says why."""
        self._servers[0][1].close()

    async def close(self) -> None:
        for server, listening in self._servers:
            server.draining = True
            listening.close()
        for server, _ in self._servers:
            server.pre_shutdown()
            await server.shutdown(LAST_WORDS_S)


async def run(app: App, stop: asyncio.Event, started: Callable[[Listeners], None]) -> None:
    """Serve until `stop` is set, then drain: readiness fails, then no new connections are taken, and running answers
    finish, all within `shutdown_s`.

    Between the first and the second lies `drain_notice_s`, in which who watches /readyz goes elsewhere, and no request
    of theirs meets a closed socket. Where nobody watches there is nothing to wait for.
    """
    listeners = Listeners(app)
    try:
        await listeners.bind()  # before any upstream is asked: an address in use is known at once
        await app.start()
        await listeners.open()
        started(listeners)
        await stop.wait()
        app.draining = True
        deadline_at = monotonic() + app.config.shutdown_s
        listeners.last_answers()
        asked_at = app.ready_asked_at
        if asked_at is not None and monotonic() - asked_at < WATCHED_S:
            await asyncio.sleep(min(app.config.drain_notice_s, app.config.shutdown_s))
        listeners.stop_accepting()
        # Looked at, not waited for: what each request does at its end is to take one from a number.
        while app.in_flight() and monotonic() < deadline_at:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if app.in_flight():
            _log.warning("%d requests are cut at the end of the drain time", app.in_flight())
            app.gate.close()
            app.transport.close()  # each gets its family's error event
            await asyncio.sleep(LAST_WORDS_S / 5)
    finally:
        await listeners.close()
        await app.stop()


def serve(
    config: Config, keys: KeyRing, announce: Callable[[str], None], load: Callable[[], Config] | None = None
) -> int:
    """Run the gateway in this process until SIGTERM or SIGINT; gives the exit code.

    `announce` is given what an operator should read. `load` reads the configuration again. Raises OSError if an
    address cannot be listened on, and RuntimeError if the installation is not fit to serve.
    """
    require_aiohttp()
    log.setup(config.log_level)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config, keys, announce, load))
    return 0


async def _serve(
    config: Config, keys: KeyRing, announce: Callable[[str], None], load: Callable[[], Config] | None
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # no signal handlers on this platform's loop
            loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        furnished = await furnish(config, stack)
        app = App(furnished.config, keys)
        wake = [app.keys.wake]
        if load is not None:
            reloader = Reloader(config, load, lambda new: app.apply(furnished.again(new)), app.reloads)
            wake.append(reloader.wake)
            stack.push_async_callback(reloader.stop)
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGHUP, lambda: [one() for one in wake])

        def started(listeners: Listeners) -> None:
            assert listeners.address is not None
            # Only now: a key that was made and never shown would lock its owner out.
            key = keys.ensure_first_key()
            if load is not None:
                reloader.start()
            quiet_collector()
            announce(greeting(furnished, app.catalog, listeners.address, listeners.metrics_address, key))

        await run(app, stop, started)


def quiet_collector() -> None:
    """Let the collector of cycles leave alone what was made until now, and look more rarely at the rest.

    A request makes no cycles (tests/journeys/test_journey_cycles.py), so there is little for it to find; looking at
    everything under way after each 700 objects, as it does by default, is a tenth of what a request costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 20, 20)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, where there is one: half of asyncio's own cost for each read and write."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()
