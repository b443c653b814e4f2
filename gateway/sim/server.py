"""SimServer: one simulated engine behind a real socket, speaking vLLM's dialect."""

from __future__ import annotations

import asyncio
import math
import ssl as tls
import time
from collections import deque
from collections.abc import Mapping
from email.utils import formatdate
from types import TracebackType
from typing import Any

import orjson

from gateway.sim.connection import Connection, Received
from gateway.sim.dialect import VERSION, ApiError, Call, error_body, load, model_of, parse_call
from gateway.sim.engine import Engine, Request
from gateway.sim.exposition import E2E_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS, Histogram, exposition
from gateway.sim.faults import NONE, Faults, parse_pairs
from gateway.sim.generation import Generation
from gateway.sim.response import Response
from gateway.sim.shapes import embeddings_body, models_body

_ROUTES = {
    "/health": "GET",
    "/metrics": "GET",
    "/version": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
}


class SimServer:
    """`async with SimServer() as sim:` listens on `sim.url` ("http://127.0.0.1:PORT/v1") until the block is left.

    `faults` may be set at any time, as `Faults` or as a mapping; a request's own come over it. `requests` holds the
    last `keep` requests received. `context` is max_model_len; `keep_alive_s` when an idle connection is closed (vLLM:
    5 s; None: never); `opening` begins every answer's text.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("sim",),
        *,
        engine: Engine | None = None,
        faults: Faults | Mapping[str, Any] | None = None,
        ssl: tls.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        context: int = 32_768,
        keep: int = 1000,
        keep_alive_s: float | None = 5.0,
        api_key: str = "",
        opening: str = "",
    ) -> None:
        self.models = models
        self.engine = engine or Engine()
        self.host = host
        self.port = port
        self.context = context
        self.keep_alive_s = keep_alive_s
        self.api_key = api_key
        self.opening = opening
        self.requests: deque[Received] = deque(maxlen=keep)
        self.requests_total = 0
        self.connections_total = 0
        self.aborted = 0  # generations the client walked away from
        self.finished = {"stop": 0, "length": 0, "tool_calls": 0}
        self.first_token_s = Histogram(TTFT_BUCKETS)
        self.inter_token_s = Histogram(ITL_BUCKETS)
        self.request_s = Histogram(E2E_BUCKETS)
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start
        self._ssl = ssl
        self._faults = NONE
        self._faulted = 0
        self.faults = faults or NONE
        self._listener: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._all_lost = asyncio.Event()
        self._all_lost.set()
        self._generations: dict[Any, Generation] = {}
        self._tick_at = math.inf
        self._tick_handle: asyncio.Handle | None = None
        self._serial = 0
        self._common: tuple[int, bytes] = (0, b"")

    # life

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._listener = await self.loop.create_server(
            lambda: Connection(self), self.host, self.port, ssl=self._ssl, backlog=4096
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        listener.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await listener.wait_closed()
        await self._all_lost.wait()
        if self._tick_handle is not None:
            self._tick_handle.cancel()

    async def __aenter__(self) -> SimServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def root(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._ssl else 'http'}://{host}:{self.port}"

    @property
    def url(self) -> str:
        """The OpenAI base URL."""
        return self.root + "/v1"

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, value: Faults | Mapping[str, Any]) -> None:
        self._faults = value if isinstance(value, Faults) else NONE.merged(value)
        self._faulted = 0

    @property
    def connections_open(self) -> int:
        return len(self._connections)

    def __repr__(self) -> str:
        return f"<SimServer {self.root} {','.join(self.models)} running={self.engine.running}>"

    # for connections and generations

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

    def created(self) -> int:
        return int(time.time())

    def common_headers(self) -> bytes:
        now = int(time.time())
        if self._common[0] != now:
            date = formatdate(now, usegmt=True).encode()
            self._common = (now, b"date: %b\r\nserver: simulated-engine\r\nvary: Origin\r\n" % date)
        return self._common[1]

    def submit(self, request: Request, generation: Generation) -> None:
        self.engine.submit(request, self.loop.time())
        self._generations[request.id] = generation
        self._schedule()

    def abort(self, id: Any) -> bool:
        known = self.engine.abort(id)
        self._generations.pop(id, None)
        if known:
            self._schedule()
        return known

    def _schedule(self) -> None:
        """One timer for the engine's next step."""
        due = self.engine.next_at
        if due >= self._tick_at:
            return
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        self._tick_at = due
        if due <= self.loop.time():
            self._tick_handle = self.loop.call_soon(self._tick)
        else:
            self._tick_handle = self.loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._tick_handle = None
        self._tick_at = -math.inf  # submissions made below are scheduled at the end
        # the loop may call a little early, by its clock's resolution
        now = max(self.loop.time(), self.engine.next_at) if self.engine.next_at < math.inf else 0.0
        for event in self.engine.step(now):
            generation = self._generations.get(event.id)
            if event.finished:
                self._generations.pop(event.id, None)
            if generation is not None:
                generation.on_event(event, event.id[1], now)  # type: ignore[index]
        self._tick_at = math.inf
        self._schedule()

    # answering

    def answer(self, connection: Connection, received: Received) -> None:
        try:
            faults = self._faults_for(received)
        except ValueError as error:
            body = error_body(400, "BadRequestError", str(error))
            self._reply(Response(connection, NONE, received.keep_alive), received, 400, body)
            return
        if faults.slow_headers_s:
            self.loop.call_later(faults.slow_headers_s, self._answer, connection, received, faults)
        else:
            self._answer(connection, received, faults)

    def _faults_for(self, received: Received) -> Faults:
        """The server's faults where they apply, under those that the request asks for in `x-sim-fault`."""
        faults = self._faults
        if faults is not NONE:
            if faults.paths:
                applies = any(received.target.startswith(path) for path in faults.paths)
            else:
                applies = received.method == "POST"
            if applies and faults.times is not None:
                self._faulted += 1
                applies = self._faulted <= faults.times
            if not applies:
                faults = NONE.merged(
                    {
                        "close_idle_s": faults.close_idle_s,
                        "close_idle_random_s": faults.close_idle_random_s,
                    }
                )
        own = received.header("x-sim-fault")
        if own is not None:
            faults = faults.merged(parse_pairs(own))
        return faults

    def _answer(self, connection: Connection, received: Received, faults: Faults) -> None:
        if connection.closed:
            return
        try:
            if not self._spoiled(connection, received, faults):
                self._route(connection, received, faults)
        except ApiError as error:
            self._reply(Response(connection, faults, received.keep_alive), received, error.status, error.body)

    def _spoiled(self, connection: Connection, received: Received, faults: Faults) -> bool:
        """Whether the request gets something else instead of its answer."""
        if faults is NONE:
            return False
        if faults.reset:
            connection.cut("rst")
            return True
        if faults.silent:
            return True
        if not faults.status and faults.body is None:
            return False
        headers: tuple[tuple[str, str], ...] = ()
        after = faults.retry_after
        if after is not None:
            headers = (("retry-after", after if isinstance(after, str) else f"{after:g}"),)
        body = faults.body
        if body is None:
            kind = {429: "RateLimitError", 503: "ServiceUnavailableError"}.get(faults.status, "InternalServerError")
            body = error_body(faults.status, kind, f"simulated fault: status {faults.status}")
        elif not isinstance(body, bytes):
            body = str(body).encode()
        response = Response(connection, faults, received.keep_alive)
        self._reply(response, received, faults.status or 200, body, faults.content_type, headers)
        return True

    def _route(self, connection: Connection, received: Received, faults: Faults) -> None:
        path = received.target.partition("?")[0]
        method = _ROUTES.get(path)
        response = Response(connection, faults, received.keep_alive)
        if method is None:
            self._reply(response, received, 404, b'{"detail":"Not Found"}')
        elif received.method != method:
            self._reply(response, received, 405, b'{"detail":"Method Not Allowed"}', headers=(("allow", method),))
        elif self.api_key and path.startswith("/v1/") and not self._authorized(received):
            self._reply(response, received, 401, b'{"error":"Unauthorized"}')
        elif method == "POST":
            self._post(connection, received, faults, path)
        elif path == "/health":
            self._reply(response, received, 200, b"", "")
        elif path == "/v1/models":
            self._reply(response, received, 200, models_body(self.models, self.context, self.created()))
        elif path == "/version":
            self._reply(response, received, 200, orjson.dumps({"version": VERSION}))
        else:
            text = exposition(self).encode()
            self._reply(response, received, 200, text, "text/plain; version=0.0.4; charset=utf-8")

    def _authorized(self, received: Received) -> bool:
        return received.header("authorization") == f"Bearer {self.api_key}"

    def _post(self, connection: Connection, received: Received, faults: Faults, path: str) -> None:
        body = load(received.body)
        if path == "/v1/embeddings":
            model = model_of(body, self.models)
            self._serial += 1
            answer = embeddings_body(body, model, self._serial, self.created())
            self._reply(Response(connection, faults, received.keep_alive), received, 200, answer)
            return
        chat = path == "/v1/chat/completions"
        call = parse_call(body, chat, self.models, self.context, faults, self.opening)
        own = call.faults
        if own is faults:
            self._generate(connection, received, call)
        elif not self._spoiled(connection, received, own):  # asked for in the body, so known only now
            delay = own.slow_headers_s - faults.slow_headers_s
            if delay > 0:
                self.loop.call_later(delay, self._generate, connection, received, call)
            else:
                self._generate(connection, received, call)

    def _generate(self, connection: Connection, received: Received, call: Call) -> None:
        if connection.closed:
            return
        self._serial += 1
        generation = Generation(self, connection, received, call, self._serial, self.created())
        try:
            generation.start()
        except ValueError as error:
            connection.work = None
            generation.drop()
            body = error_body(400, "BadRequestError", str(error))
            self._reply(Response(connection, call.faults, received.keep_alive), received, 400, body)

    def _reply(
        self,
        response: Response,
        received: Received,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        response.begin(status, content_type, len(body), headers)
        if received.method == "HEAD" or not body or response.send(body):
            response.end()
