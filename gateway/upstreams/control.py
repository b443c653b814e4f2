"""The control plane: the program's one aiohttp client session, for everything that is not a prompt.

Probes, discovery and Ollama's model management go through here. The session follows no redirects, keeps no
cookies, trusts no proxy from the environment and asks for identity encoding; bodies are read up to a cap.
Foreign errors are translated here, once: what leaves is a `GatewayError` or a `Health`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import aiohttp
import orjson

from gateway.errors import UpstreamError, UpstreamUnreachable
from gateway.runtimes.runtime import Details
from gateway.upstreams.reasons import FOREIGN, TooLarge, error_text, explain
from gateway.upstreams.upstream import Health, Upstream

#: Bodies beyond this are refused. The largest model lists in the wild (aggregators) are about 1 MiB.
BODY_MAX_BYTES: Final = 8 * 1024 * 1024
#: Runtimes on uvicorn and llama.cpp close idle connections after 5 s; a shorter life avoids the race.
_IDLE_S: Final = 3.0
_FETCH_S: Final = 5.0
#: what a probe spends on more than health
DETAILS_S: Final = 0.5
_JSON: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of an upstream, whatever its status. `server` is its `Server` header, "" without one."""

    status: int
    content_type: str
    server: str
    body: bytes
    latency_s: float

    def reason(self) -> str:
        """The status and, where the body has one, its error message: "503: Loading model"."""
        text = error_text(self.body)
        return f"{self.status}: {text}" if text else f"HTTP status {self.status}"


class Stream:
    """An answer that is still coming: `status`, and its body by `piece` or, for an error, whole by `read`."""

    __slots__ = ("_idle_s", "_name", "_response", "status")

    def __init__(self, response: aiohttp.ClientResponse, name: str, idle_s: float) -> None:
        self._response = response
        self._name = name
        self._idle_s = idle_s
        self.status = response.status

    async def piece(self) -> bytes:
        """The next bytes of the body as they arrive, b"" at its end. A cut body raises UpstreamBroken.

        Safe to cancel: no byte is lost, and the next call goes on.
        """
        with _translated(self._name, self._idle_s):
            return await self._response.content.readany()

    async def read(self) -> bytes:
        """The body whole, up to the cap."""
        with _translated(self._name, self._idle_s):
            return await _read(self._response)


class Control:
    """The client session and the probes made with it. Use as an async context manager, or `start` and
    `close`.

    `timeout_s` caps one probe whole (connect, both doors); an answer later than `slow_s` makes the upstream
    degraded. At most `probes_max` probes run at once.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 2.0,
        slow_s: float = 1.0,
        probes_max: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self.slow_s = slow_s
        self.clock = clock
        self._seats = asyncio.Semaphore(probes_max)
        self._probing: dict[Upstream, asyncio.Task[Health]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the session; needs the running loop."""
        self._session = aiohttp.ClientSession(
            # Model pulls hold a connection for minutes: room for them and for every probe beside them.
            connector=aiohttp.TCPConnector(limit=256, keepalive_timeout=_IDLE_S, ttl_dns_cache=10),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity", "User-Agent": "local-llm-gateway"},
        )

    async def close(self) -> None:
        """Cancel the probes that run and close every connection. Safe to call twice."""
        tasks = list(self._probing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Control:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, url: str, *, name: str = "", api_key: str = "", timeout_s: float | None = None) -> Answer:
        """GET `url`; any status is an answer. `name` stands for the upstream in error messages.

        Raises UpstreamUnreachable, UpstreamTimeout or UpstreamBroken.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        with _translated(name or url, limit_s):
            return await self._exchange("GET", url, _headers(api_key), None, limit_s)

    async def fetch(self, url: str) -> bytes:
        """The body of a document that is no upstream's. Raises UpstreamError for any status but 200, else as `get`."""
        answer = await self.get(url, timeout_s=_FETCH_S)
        if answer.status != 200:
            raise UpstreamError(f"{url}: {answer.reason()}")
        return answer.body

    async def send(
        self,
        method: str,
        upstream: Upstream,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Answer:
        """One whole exchange at `path` (relative to the upstream's root), with `document` as JSON if given.

        Errors as for `get`.
        """
        with _translated(upstream.name, timeout_s):
            return await self._exchange(
                method, _url(upstream, path), _headers_for(upstream), document, timeout_s, _tls_name(upstream)
            )

    @asynccontextmanager
    async def open_stream(
        self, upstream: Upstream, path: str, document: Mapping[str, Any], *, connect_s: float, idle_s: float
    ) -> AsyncIterator[Stream]:
        """POST `document` and hand out the answer while it comes. Leaving closes the upstream connection at
        once.

        `idle_s` limits the wait for the headers and for each piece. Errors as for `get`.
        """
        timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s, sock_read=idle_s)
        with _translated(upstream.name, idle_s):
            response = await self._opened().request(
                "POST",
                _url(upstream, path),
                data=orjson.dumps(document),
                headers=_headers_for(upstream) | _JSON,
                allow_redirects=False,
                timeout=timeout,
                server_hostname=_tls_name(upstream),
            )
        try:
            yield Stream(response, upstream.name, idle_s)
        finally:
            # close(), not release(): an unfinished download must stop when nobody listens any more
            response.close()

    async def probe(self, upstream: Upstream) -> Health:
        """Ask `upstream` how it is, at its health door and its model list; set its `health` and `models`.

        Costs no tokens and wakes no model: the doors are those of its `Runtime`. Callers that come while a
        probe of the same upstream runs get that probe's result; one caller's cancellation does not stop it
        for the others.
        """
        task = self._probing.get(upstream)
        if task is None:
            task = asyncio.create_task(self._probe(upstream), name=f"probe {upstream.name}")
            self._probing[upstream] = task
            task.add_done_callback(lambda _: self._probing.pop(upstream, None))
        return await asyncio.shield(task)

    async def fresh(self, upstream: Upstream, max_age_s: float) -> Health:
        """The upstream's health, at most `max_age_s` old: probed now if the last finding is older."""
        known = upstream.health
        if known.status != "unknown" and self.clock() - known.checked_at <= max_age_s:
            return known
        return await self.probe(upstream)

    async def _probe(self, upstream: Upstream) -> Health:
        async with self._seats:
            try:
                async with asyncio.timeout(self.timeout_s):
                    reason, latency_s = await self._visit(upstream)
                upstream.health = Health("degraded" if reason else "ok", reason, latency_s, self.clock())
            except FOREIGN as error:
                kind, reason = explain(error, self.timeout_s)
                gone = kind is UpstreamUnreachable
                upstream.health = Health("unreachable", reason, None, self.clock(), gone)
            else:
                await self._learn(upstream)
            return upstream.health

    async def _learn(self, upstream: Upstream) -> None:
        """Hear what the runtime says of itself at its further door. Its health does not depend on that."""
        runtime = upstream.runtime
        if runtime.cache_path and upstream.cache_tokens is None:  # it does not change while the engine runs
            try:
                async with asyncio.timeout(DETAILS_S):
                    answer = await self._ask(upstream, runtime.cache_path)
            except FOREIGN:
                return
            upstream.size_cache(runtime.parse_cache(answer.body) if answer.status == 200 else 0)
        if not runtime.details_path:
            return
        try:
            async with asyncio.timeout(DETAILS_S):
                answer = await self._ask(upstream, runtime.details_path)
            details = runtime.parse_details(answer.body) if answer.status == 200 else Details()
        except (*FOREIGN, ValueError):
            return  # as it was
        upstream.slots = details.slots
        upstream.loaded = details.loaded or frozenset()
        upstream.tells_loaded = details.loaded is not None

    async def _visit(self, upstream: Upstream) -> tuple[str, float]:
        """What is wrong with an upstream that answers ("" if nothing), and the slower of its two round
        trips.
        """
        runtime = upstream.runtime
        latency_s = 0.0
        if runtime.health_path != runtime.models_path:
            health = await self._ask(upstream, runtime.health_path)
            latency_s = health.latency_s
            # Proxies in front of a runtime often pass /v1 only: a missing door says nothing about the models.
            if health.status not in (404, 405) and (wrong := _complaint(upstream, health)):
                return wrong, latency_s
        listed = await self._ask(upstream, runtime.models_path)
        latency_s = max(latency_s, listed.latency_s)
        if wrong := _complaint(upstream, listed):
            return wrong, latency_s
        try:
            upstream.models = runtime.parse_models(listed.body)
            upstream.windows = runtime.parse_windows(listed.body)
        except ValueError as error:
            return str(error), latency_s
        if not upstream.models:
            return "the runtime lists no models", latency_s
        if latency_s > self.slow_s:
            return f"slow: answered after {latency_s:.1f} s", latency_s
        return "", latency_s

    async def _ask(self, upstream: Upstream, path: str) -> Answer:
        return await self._exchange(
            "GET", _url(upstream, path), _headers_for(upstream), None, None, _tls_name(upstream)
        )

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        document: Mapping[str, Any] | None,
        timeout_s: float | None,
        server_hostname: str | None = None,
    ) -> Answer:
        began_at = self.clock()
        async with (
            asyncio.timeout(timeout_s),
            self._opened().request(
                method,
                url,
                data=None if document is None else orjson.dumps(document),
                headers=headers if document is None else {**headers, **_JSON},
                allow_redirects=False,
                server_hostname=server_hostname,
            ) as response,
        ):
            body = await _read(response)
            return Answer(
                response.status,
                response.content_type,
                response.headers.get("Server", ""),
                body,
                self.clock() - began_at,
            )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Control is not started")
        return self._session


@contextmanager
def _translated(name: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except FOREIGN as error:
        kind, reason = explain(error, timeout_s)
        raise kind(f"{name}: {reason}") from error


def _complaint(upstream: Upstream, answer: Answer) -> str:
    """What is wrong with an answer that should have been a 200, "" if nothing."""
    if answer.status == 200:
        return ""
    if answer.status in (401, 403):
        # Never the runtime's own words here: some repeat the key they were given.
        told = "was refused" if upstream.api_key else "is empty and the runtime wants one"
        return f"{answer.status}: the provider's apiKey {told}"
    if 300 <= answer.status < 400:
        return f"{answer.status}: it redirects, and redirects are not followed; set baseUrl to the final address"
    reason = answer.reason()
    return reason.replace(upstream.api_key, "***") if upstream.api_key else reason


def _url(upstream: Upstream, path: str) -> str:
    return f"{upstream.scheme}://{upstream.place}{upstream.runtime.locate(upstream.prefix, path)}"


def _tls_name(upstream: Upstream) -> str | None:
    """The name its certificate must have, where that is not the one that is connected to."""
    return upstream.host if upstream.place != upstream.netloc else None


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _headers_for(upstream: Upstream) -> dict[str, str]:
    headers = _headers(upstream.api_key)
    if upstream.place != upstream.netloc:
        headers["Host"] = upstream.netloc
    return headers


async def _read(response: aiohttp.ClientResponse) -> bytes:
    pieces = []
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > BODY_MAX_BYTES:
            raise TooLarge(BODY_MAX_BYTES)
        pieces.append(piece)
    return b"".join(pieces)
