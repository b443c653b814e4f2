"""SimServer: one simulated engine behind a real socket, speaking vLLM's dialect."""

from __future__ import annotations

import asyncio
import math
import ssl as tls
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.sim.connection import Connection, Received
from gateway.sim.dialect import ApiError, Call, model_of
from gateway.sim.engine import Engine, Request
from gateway.sim.exposition import E2E_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS, Histogram
from gateway.sim.faults import NONE, Faults, parse_pairs
from gateway.sim.generation import Generation
from gateway.sim.listener import Listener
from gateway.sim.response import Response
from gateway.sim.runtimes import RUNTIMES
from gateway.sim.shapes import embeddings_body


class SimServer(Listener):
    """`async with SimServer() as sim:` listens on `sim.url` ("http://127.0.0.1:PORT/v1") until the block is left.

    `faults` may be set at any time, as `Faults` or as a mapping; a request's own come over it. `requests` holds the
    last `keep` requests received. `context` is max_model_len; `keep_alive_s` when an idle connection is closed (vLLM:
    5 s; None: never); `opening` begins every answer's text. `kill()` and `revive()` are a process's death and restart;
    each start takes `start_delay_s`. `/metrics` shows what was true `metrics_lag_s` ago. `runtime`: whose ways it has.
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
        start_delay_s: float = 0.0,
        metrics_lag_s: float = 0.0,
        runtime: str = "vllm",
    ) -> None:
        super().__init__(host, port, ssl, keep)
        self.runtime = RUNTIMES[runtime]
        self.models = models
        self.engine = engine or Engine()
        self.context = context
        self.keep_alive_s = keep_alive_s
        self.api_key = api_key
        self.opening = opening
        self.start_delay_s = start_delay_s
        self.metrics_lag_s = metrics_lag_s
        self.faults = faults or NONE
        self.tokens_before = (0, 0)  # prompt and generation tokens of the engines that were killed
        self._reset_counters()
        self._generations: dict[Any, Generation] = {}
        self._starting: asyncio.Task[None] | None = None
        self._loading_until = -math.inf
        self._headless: list[Generation] = []  # not admitted yet, by runtimes that answer nothing until then
        self._tick_at = math.inf
        self._tick_handle: asyncio.Handle | None = None
        self._serial = 0
        self._pages: deque[tuple[float, str]] = deque()  # of /metrics, oldest first
        self._sampling: asyncio.TimerHandle | None = None

    def _reset_counters(self) -> None:
        self.aborted = 0  # generations the client walked away from
        self.finished = {"stop": 0, "length": 0, "tool_calls": 0}
        self.first_token_s = Histogram(TTFT_BUCKETS)
        self.inter_token_s = Histogram(ITL_BUCKETS)
        self.request_s = Histogram(E2E_BUCKETS)

    # life

    async def start(self) -> None:
        await super().start()
        if self.metrics_lag_s:
            self._sample()

    async def listen(self) -> None:
        """Serve `start_delay_s` from now. Until then vLLM does not listen, and llama.cpp says 503 to everything."""
        if self.runtime.loading is not None:
            self._loading_until = self.loop.time() + self.start_delay_s
            await super().listen()
        elif self.start_delay_s:
            self._later(self.start_delay_s, super().listen)
        else:
            await super().listen()

    def _later(self, seconds: float, listen: Callable[[], Awaitable[None]]) -> None:
        async def start() -> None:
            await asyncio.sleep(seconds)
            self._starting = None
            await listen()

        if self._starting is None:
            self._starting = self.loop.create_task(start(), name=f"start of {self!r}")

    def kill(self, down_s: float | None = None) -> None:
        """Die as from kill -9, and start again after `down_s`, if it is given.

        What the engine had goes with it: its requests, its cache, its counters.
        """
        for connection in self._connections:
            connection.work = None  # no client has left it: we did
        self._end()
        prompt, generated = self.tokens_before
        engine = self.engine
        self.tokens_before = (prompt + engine.prompt_tokens_total, generated + engine.generation_tokens_total)
        self.engine = engine.blank()
        self._generations.clear()
        self._headless.clear()
        self._reset_counters()
        if down_s is not None:
            self._later(down_s, self.listen)

    async def revive(self) -> None:
        """Start again: listening when this returns, unless a start takes its time."""
        await self.listen()

    async def stop(self) -> None:
        self._end()
        if self._sampling is not None:
            self._sampling.cancel()
        await super().stop()

    def _end(self) -> None:
        self.drop()
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        if self._tick_handle is not None:
            self._tick_handle.cancel()
            self._tick_handle = None
        self._tick_at = math.inf

    @property
    def tokens_ever(self) -> tuple[int, int]:
        """Prompt and generation tokens, those of killed engines among them."""
        prompt, generated = self.tokens_before
        return prompt + self.engine.prompt_tokens_total, generated + self.engine.generation_tokens_total

    @property
    def url(self) -> str:
        """The OpenAI base URL."""
        return self.root + "/v1"

    def __repr__(self) -> str:
        return f"<SimServer {self.root} {','.join(self.models)} running={self.engine.running}>"

    def _sample(self) -> None:
        """Keep the pages of the last `metrics_lag_s`."""
        now = self.loop.time()
        self._pages.append((now, self.runtime.exposition(self)))
        while len(self._pages) > 1 and self._pages[1][0] <= now - self.metrics_lag_s:
            self._pages.popleft()
        self._sampling = self.loop.call_later(min(self.metrics_lag_s / 8, 0.5), self._sample)

    def metrics_page(self) -> str:
        return self._pages[0][1] if self._pages else self.runtime.exposition(self)

    # for connections and generations

    def created(self) -> int:
        return int(time.time())

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

    def await_admission(self, generation: Generation) -> None:
        """`begin` it once its first sequence is worked on."""
        self._headless.append(generation)

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
        if self._headless:
            waiting, self._headless = self._headless, []
            for generation in waiting:
                if not self.engine.is_waiting((generation.serial, 0)):
                    generation.begin()
                else:
                    self._headless.append(generation)
        self._tick_at = math.inf
        self._schedule()

    # answering

    def answer(self, connection: Connection, received: Received) -> None:
        if self._loading_until > self.loop.time():
            assert self.runtime.loading is not None
            self._reply(Response(connection, NONE, received.keep_alive), received, 503, self.runtime.loading)
            return
        try:
            faults = self._faults_for(received)
        except ValueError as error:
            body = self.runtime.error(400, "BadRequestError", str(error))
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
            body = self.runtime.error(faults.status, kind, f"simulated fault: status {faults.status}")
        elif not isinstance(body, bytes):
            body = str(body).encode()
        response = Response(connection, faults, received.keep_alive)
        self._reply(response, received, faults.status or 200, body, faults.content_type, headers)
        return True

    def _route(self, connection: Connection, received: Received, faults: Faults) -> None:
        ways = self.runtime
        path = received.target.partition("?")[0]
        page = ways.pages.get(path)
        known = "GET" if page else "POST" if path in ways.calls or path == ways.embeddings else None
        response = Response(connection, faults, received.keep_alive)
        if known is None or (received.method != known and ways.wrong_method is None):
            self._reply(response, received, 404, ways.not_found)
        elif received.method != known:
            self._reply(response, received, 405, ways.wrong_method or b"", headers=(("allow", known),))
        elif self.api_key and path.startswith("/v1/") and not self._authorized(received):
            self._reply(response, received, 401, ways.unauthorized)
        elif page is None:
            self._post(connection, received, faults, path)
        else:
            content_type, body = page(self)
            self._reply(response, received, 200, body, content_type)

    def _authorized(self, received: Received) -> bool:
        return received.header("authorization") == f"Bearer {self.api_key}"

    def _post(self, connection: Connection, received: Received, faults: Faults, path: str) -> None:
        ways = self.runtime
        body = ways.load(received.body)
        if path == ways.embeddings:
            model = model_of(body, self.models)
            self._serial += 1
            answer = embeddings_body(body, model, self._serial, self.created())
            self._reply(Response(connection, faults, received.keep_alive), received, 200, answer)
            return
        call = ways.parse(body, ways.calls[path], self.models, self.context, faults, self.opening)
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
            body = self.runtime.error(400, "BadRequestError", str(error))
            self._reply(Response(connection, call.faults, received.keep_alive), received, 400, body)

    def _reply(
        self,
        response: Response,
        received: Received,
        status: int,
        body: bytes,
        content_type: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        response.begin(status, self.runtime.json_type if content_type is None else content_type, len(body), headers)
        if received.method == "HEAD" or not body or response.send(body):
            response.end()
