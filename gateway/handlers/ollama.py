"""Ollama's models: `GET /api/local-llm/ollama/list`, `POST …/pull`, `POST …/delete`.

What Ollama's own API gives is in https://docs.ollama.com/api (tags, pull, delete). Errors before the answer
has begun are raised as `GatewayError`; an error after that is a line of the NDJSON stream, as Ollama writes
it.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import Any, Final

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from gateway.answer import EXCHANGE, send, send_json
from gateway.errors import (
    BadRequest,
    Forbidden,
    GatewayError,
    ModelNotFound,
    NotFound,
    UpstreamBroken,
    UpstreamError,
    render_event,
)
from gateway.exchange import Exchange
from gateway.passage.resolve import BodyLimits, read_body
from gateway.upstreams.control import Control, Stream
from gateway.upstreams.reasons import error_text
from gateway.upstreams.upstream import Upstream
from gateway.wire.ndjson import NdjsonSplitter

#: Registries a pull may name besides Ollama's own. Any other host is refused: the Ollama host would connect
#: to whatever address a client writes, inside the operator's network too.
REGISTRIES: Final = frozenset({"registry.ollama.ai", "hf.co", "huggingface.co"})

_BODY: Final = BodyLimits(max_bytes=16 * 1024, timeout_s=10.0, min_rate=0)
_LINE_MAX_BYTES: Final = 256 * 1024
_NAME_MAX_CHARS: Final = 350
#: [[registry[:port]/]namespace/]name[:tag]
_NAME: Final = re.compile(
    r"(?:(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?/)?[A-Za-z0-9][A-Za-z0-9._-]*/)?"
    r"[A-Za-z0-9][A-Za-z0-9._-]*(?::[A-Za-z0-9][A-Za-z0-9._-]*)?"
)

_LIST_S: Final = 10.0
_DELETE_S: Final = 60.0  # removing a large model's blobs from a slow disk
_CONNECT_S: Final = 5.0
_PULL_IDLE_S: Final = 900.0  # "verifying sha256 digest" is silent for minutes on a large model
#: A pull that cannot begin says so right after its first line; holding that line for so long gives such a
#: pull the error status it deserves.
_HOLD_S: Final = 3.0


class Ollama:
    """The three handlers. `upstream` is the address of OLLAMA_BASE_URL, None if that is not set."""

    def __init__(
        self,
        control: Control,
        upstream: Upstream | None,
        *,
        enable_pull: bool = False,
        registries: frozenset[str] = REGISTRIES,
        hold_s: float = _HOLD_S,
    ) -> None:
        self._control = control
        self._upstream = upstream
        self._enable_pull = enable_pull
        self._registries = registries
        self._hold_s = hold_s

    async def list_models(self, request: web.BaseRequest) -> web.StreamResponse:
        """Ollama's `/api/tags` as it is: `{"models": [{"name", "size", "digest", "details", …}]}`.

        Without the models that the caller's key may not use.
        404 if Ollama is not configured, 502 or 504 with the reason if it does not answer.
        """
        upstream = self._configured(request)
        path = upstream.runtime.paths["ollama_list"]
        answer = await self._control.send("GET", upstream, path, timeout_s=_LIST_S)
        request[EXCHANGE].upstream_s = answer.latency_s
        if answer.status != 200:
            raise UpstreamError(f"{upstream.name}: {answer.reason()}")
        principal = request[EXCHANGE].principal
        if principal is None or principal.models is None:
            return send(request, answer.body)
        return send_json(request, _allowed(answer.body, principal, upstream.name))

    async def delete(self, request: web.BaseRequest) -> web.StreamResponse:
        """Body `{"model": name}`; answers `{"status": "success"}`. 404 if Ollama has no such model."""
        upstream = self._configured(request)
        self._permitted()
        model = await _model(request)
        _for_this_key(request, model)
        path = upstream.runtime.manage["delete"]
        answer = await self._control.send("DELETE", upstream, path, {"model": model}, timeout_s=_DELETE_S)
        request[EXCHANGE].upstream_s = answer.latency_s
        if answer.status != 200:
            raise _refusal(answer.status, error_text(answer.body) or answer.reason(), "delete", model)
        return send_json(request, {"status": "success"})

    async def pull(self, request: web.BaseRequest) -> web.StreamResponse:
        """Body `{"model": name}`; answers Ollama's progress lines as they come (application/x-ndjson).

        `{"status": "pulling 941f309b54ca", "digest", "total", "completed"}` … `{"status": "success"}`. A
        pull that fails at once is an error status (404 where the registry has no such model); one that
        fails later ends with the line `{"error": "text"}`, and so does one that is cut. When the client
        leaves, the pull stops; Ollama keeps what it has and resumes there.
        """
        upstream = self._configured(request)
        self._permitted()
        model = await _model(request)
        _for_this_key(request, model)
        _known_registry(model, self._registries)
        document = {"model": model, "stream": True}
        path = upstream.runtime.manage["pull"]
        began_at = self._control.clock()
        try:
            async with self._control.open_stream(
                upstream, path, document, connect_s=_CONNECT_S, idle_s=_PULL_IDLE_S
            ) as stream:
                if stream.status != 200:
                    text = error_text(await stream.read())
                    raise _refusal(stream.status, text or f"HTTP status {stream.status}", "pull", model)
                return await self._relay(request, upstream, stream, model)
        finally:
            request[EXCHANGE].upstream_s = self._control.clock() - began_at

    async def _relay(
        self, request: web.BaseRequest, upstream: Upstream, stream: Stream, model: str
    ) -> web.StreamResponse:
        exchange = request[EXCHANGE]
        lines = _Lines(upstream.name, stream)
        # Raises what is wrong while an error status can still be sent.
        ready = await self._opening(lines, model)
        response = _Progress(exchange)
        await response.prepare(request)
        try:
            await _copy(ready, lines, response, model)
        except _PullFailed as failed:
            exchange.error, exchange.outcome = failed.error, "upstream_error"
        except UpstreamError as error:
            exchange.error, exchange.outcome = error, "partial"
            await response.write(render_event(error, "ollama"))
        await response.write_eof()
        return response

    async def _opening(self, lines: _Lines, model: str) -> list[bytes]:
        """The first line, and the second if it comes within the hold time."""
        ready = [await lines.next()]
        if not ready[0]:
            raise UpstreamBroken("Ollama ended the pull without a word")
        _raise_if_failed(ready[0], model)
        try:
            async with asyncio.timeout(self._hold_s):
                ready.append(await lines.next())
        except TimeoutError:
            return ready
        _raise_if_failed(ready[1], model)
        return ready

    def _configured(self, request: web.BaseRequest) -> Upstream:
        if self._upstream is None:
            raise NotFound("Ollama is not configured here: set `OLLAMA_BASE_URL`", code="ollama_not_configured")
        exchange = request[EXCHANGE]
        exchange.provider, exchange.upstream = self._upstream.provider, self._upstream.name
        return self._upstream

    def _permitted(self) -> None:
        if not self._enable_pull:
            raise Forbidden(
                "pulling and deleting models is switched off: set `LOCAL_LLM_ENABLE_PULL=true` to allow it",
                code="pull_disabled",
            )


class _Progress(web.StreamResponse):
    """The NDJSON answer. Counts its bytes and marks the commit point on the Exchange."""

    def __init__(self, exchange: Exchange) -> None:
        headers = {
            "Server": "llm-gateway",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
            "X-Request-Id": exchange.id,
        }
        super().__init__(headers=headers)
        self.content_type = "application/x-ndjson"
        self._exchange = exchange

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._exchange.committed = True
        return await super().prepare(request)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await super().write(data)
        self._exchange.response_bytes += len(data)


class _PullFailed(Exception):
    """Ollama said so itself, in a line that has been relayed."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__(error.message)
        self.error = error


class _Lines:
    """The lines of a stream, each with its LF; the last one gets the LF it may lack."""

    __slots__ = ("_ended", "_name", "_ready", "_splitter", "_stream")

    def __init__(self, name: str, stream: Stream) -> None:
        self._name = name
        self._stream = stream
        self._splitter = NdjsonSplitter()
        self._ready: deque[bytes] = deque()
        self._ended = False

    async def next(self) -> bytes:
        """The next line, b"" at the end. Safe to cancel."""
        while not self._ready and not self._ended:
            piece = await self._stream.piece()
            if piece:
                self._ready.extend(self._splitter.feed(piece))
                if self._splitter.held_bytes > _LINE_MAX_BYTES:
                    raise UpstreamBroken(f"{self._name}: a progress line is longer than {_LINE_MAX_BYTES} bytes")
            else:
                self._ended = True
                if rest := self._splitter.rest():
                    self._ready.append(rest + b"\n")
        return self._ready.popleft() if self._ready else b""


async def _copy(ready: list[bytes], lines: _Lines, response: web.StreamResponse, model: str) -> None:
    """Write the lines as they come. Raises _PullFailed after an error line, UpstreamError if no result
    came.
    """
    status = ""
    for line in ready:
        await response.write(line)
        status = _progress(line)[0] or status
    while line := await lines.next():
        await response.write(line)
        said, error = _progress(line)
        if error:
            raise _PullFailed(_refusal(500, error, "pull", model))
        status = said or status
    if status != "success":
        raise UpstreamBroken("Ollama ended the pull without a result")


def _progress(line: bytes) -> tuple[str, str]:
    """(status, error) of one progress line; ("", "") for a line that is no JSON object."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "", ""
    if not isinstance(document, dict):
        return "", ""
    status = document.get("status")
    return status if isinstance(status, str) else "", error_text(line) if "error" in document else ""


def _raise_if_failed(line: bytes, model: str) -> None:
    error = _progress(line)[1]
    if error:
        raise _refusal(500, error, "pull", model)


def _refusal(status: int, text: str, verb: str, model: str) -> GatewayError:
    """Ollama's refusal as an error of ours. Its pull errors carry no status, only words."""
    message = f"Ollama could not {verb} {model!r}: {text}"
    if status == 404 or "file does not exist" in text:
        return ModelNotFound(message, param="model")
    if status == 400:
        return BadRequest(message, param="model")
    return UpstreamError(message)


def _may_use(principal: Any, name: str) -> bool:
    """Ollama takes a name without a tag for the one with ":latest", so both are one model."""
    plain = name.removesuffix(":latest")
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return any(principal.may_use(one) for one in (name, plain, tagged))


def _for_this_key(request: web.BaseRequest, model: str) -> None:
    principal = request[EXCHANGE].principal
    if principal is not None and not _may_use(principal, model):
        raise Forbidden(f"this key may not use {model!r}", param="model", code="model_not_allowed")


def _allowed(raw: bytes, principal: Any, upstream: str) -> dict[str, Any]:
    """The model list without what the key may not use."""
    try:
        document = orjson.loads(raw)
        models = [one for one in document["models"] if _may_use(principal, one["name"])]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UpstreamBroken(f"{upstream}: its list of models cannot be read") from None
    return {"models": models}


async def _model(request: web.BaseRequest) -> str:
    """The checked `model` of a body `{"model": name}`."""
    try:
        document = orjson.loads(await read_body(request, _BODY))
    except orjson.JSONDecodeError:
        raise BadRequest('the body is not JSON: send {"model": "name"}', code="invalid_json") from None
    if not isinstance(document, dict):
        raise BadRequest('the body is no JSON object: send {"model": "name"}')
    unknown = sorted(set(document) - {"model"})
    if unknown:
        # "insecure" would let a client switch off TLS between Ollama and a registry, so nothing passes by
        # accident.
        raise BadRequest(f'unknown field {unknown[0][:64]!r}: the body is {{"model": "name"}}', param=unknown[0][:64])
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` is missing: the name of an Ollama model, such as llama3.2:1b", param="model")
    _check_name(model)
    return model


def _check_name(model: str) -> None:
    if len(model) > _NAME_MAX_CHARS or not _NAME.fullmatch(model):
        raise BadRequest("`model` is no Ollama model name: [namespace/]name[:tag]", param="model")


def _known_registry(model: str, registries: frozenset[str]) -> None:
    registry, _, rest = model.partition("/")
    if "/" in rest and registry.lower() not in registries:
        allowed = ", ".join(sorted(registries))
        raise Forbidden(
            f"models are not pulled from the registry {registry!r} here; allowed: {allowed}",
            param="model",
            code="registry_not_allowed",
        )
