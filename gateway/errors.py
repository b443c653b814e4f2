"""The one error tree: what a client is told when the gateway itself must answer.

Raise the class that names the fact; the errors middleware renders it once, in the shape of the API family the
client speaks (`render`). Foreign errors (OSError, parser errors) are translated where they arise, never here.

Bodies: OpenAI `{"error": {"message", "type", "param", "code"}}`; Ollama `{"error": "text"}`; Anthropic
`{"type": "error", "error": {"type", "message"}, "request_id"}`. Shapes as the families' API references give them.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson

#: "responses" is OpenAI's, but for what ends a stream
Family = Literal["openai", "responses", "ollama", "anthropic"]


class GatewayError(Exception):
    """An answer the gateway makes itself.

    `message` says what is wrong and what to do; it never repeats bytes of the request beyond names the client is
    entitled to see. `retry_after_s` becomes `Retry-After` (whole seconds, at least 1).
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    #: who is to blame, for metrics and records: "client", "gateway" or "upstream"
    blame = "gateway"
    #: the upstream's own code, which the client is told in place of ours; no record and no metric has it
    told_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        self.retry_after_s = retry_after_s
        self.headers = headers

    @property
    def retry(self) -> bool:
        """Whether the same request may do better when it is sent again."""
        return self.blame != "client" and self.code != "upstream_total_timeout"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} {self.code}: {self.message}>"


class BadRequest(GatewayError):
    status, type, code, blame = 400, "invalid_request_error", "invalid_request", "client"


class Unauthorized(GatewayError):
    status, type, code, blame = 401, "authentication_error", "invalid_api_key", "client"


class Forbidden(GatewayError):
    status, type, code, blame = 403, "permission_error", "forbidden", "client"


class NotFound(GatewayError):
    status, type, code, blame = 404, "invalid_request_error", "not_found", "client"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    status, type, code, blame = 405, "invalid_request_error", "method_not_allowed", "client"


class RequestTimeout(GatewayError):
    """The client sent its request too slowly (408)."""

    status, type, code, blame = 408, "invalid_request_error", "request_timeout", "client"


class BodyTooLarge(GatewayError):
    status, type, code, blame = 413, "invalid_request_error", "request_too_large", "client"


class UnsupportedMedia(GatewayError):
    status, type, code, blame = 415, "invalid_request_error", "unsupported_content_encoding", "client"


class RateLimited(GatewayError):
    """A limit of the client's own is reached; OpenAI's `type` says of what: "requests" or "tokens"."""

    status, type, code, blame = 429, "requests", "rate_limit_exceeded", "client"


class QuotaExceeded(GatewayError):
    """The budget is spent. 402 and not OpenAI's 429, which clients answer by trying again; its `type` and `code`."""

    status, type, code, blame = 402, "insufficient_quota", "insufficient_quota", "client"


class VersionNotSupported(GatewayError):
    status, type, code, blame = 505, "invalid_request_error", "http_version_not_supported", "client"


class UpstreamError(GatewayError):
    """The runtime behind the gateway failed; `sent` tells whether it may have seen the request."""

    status, type, code, blame = 502, "upstream_error", "upstream_error", "upstream"
    sent = True
    word = ""

    @property
    def outcome(self) -> str:
        """The attempt's outcome in one word: a key of `gateway.routing.retries.RULES`."""
        return self.word or self.code.removeprefix("upstream_")


class UpstreamUnreachable(UpstreamError):
    """No connection could be made: nothing was sent, so another upstream may be tried."""

    code = "upstream_unreachable"
    sent = False


class UpstreamBroken(UpstreamError):
    """Sent, but the answer did not come, was cut, or was not HTTP."""

    code = "upstream_broken"


class UpstreamGivenUp(UpstreamBroken):
    """The gateway itself is shutting down: no upstream's fault, and nothing to try again."""

    word = "given_up"


class UpstreamSilent(UpstreamBroken):
    """Sent, and the connection ended without a byte of an answer."""

    word = "no_answer"


class UpstreamGarbled(UpstreamBroken):
    """It answered, and not in HTTP."""

    word = "garbled"


class UpstreamInterrupted(UpstreamError):
    """The upstream reported its own failure inside its stream; `rest` came before that, and is not sent on yet."""

    code = "upstream_stream_error"
    rest = b""


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class NoCapacity(GatewayError):
    """503: no upstream can take the request now (429 is reserved for the client's own limits)."""

    status, type, code = 503, "overloaded_error", "no_capacity"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def render(
    error: GatewayError, family: Family = "openai", request_id: str = "", used: tuple[int, int] | None = None
) -> bytes:
    """The JSON body of `error` in the client's API family, without a trailing newline.

    `used`: tokens of the prompt and of the answer so far, for an answer that had begun; then it is also said whether
    the same request may do better when it is sent again (`retry`).
    """
    if family == "ollama":
        if used is None:
            return orjson.dumps({"error": error.message})
        counts = {"prompt_eval_count": used[0], "eval_count": used[1]}
        return orjson.dumps({"error": error.message, "retry": error.retry, **counts})
    if family == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        inner: dict[str, Any] = {"type": kind, "message": error.message}
        if used is not None:
            inner |= {"retry": error.retry, "usage": {"input_tokens": used[0], "output_tokens": used[1]}}
        return orjson.dumps({"type": "error", "error": inner, "request_id": request_id})
    inner = {"message": error.message, "type": error.type, "param": error.param, "code": error.told_code or error.code}
    if used is not None:
        counts = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
        inner |= {"retry": error.retry, "usage": counts}
    return orjson.dumps({"error": inner})


def render_event(
    error: GatewayError,
    family: Family = "openai",
    request_id: str = "",
    used: tuple[int, int] | None = None,
    begun: bytes = b"",
) -> bytes:
    """The error as the last event of a stream that has begun: an SSE event, or one NDJSON line for Ollama.

    Never followed by `[DONE]`: a client must not take a broken answer for a finished one. `begun`: the event with which
    a stream of Responses began; what it says of the response is said again.
    """
    if family == "responses":
        return _response_failed(error, request_id, used, begun)
    body = render(error, family, request_id, used)
    if family == "ollama":
        return body + b"\n"
    if family == "anthropic":
        return b"event: error\ndata: " + body + b"\n\n"
    return b"data: " + body + b"\n\n"


def _response_failed(error: GatewayError, request_id: str, used: tuple[int, int] | None, begun: bytes) -> bytes:
    """`response.failed`, which has the whole response object."""
    response: dict[str, Any] = {"id": f"resp_{request_id}", "object": "response", "output": []}
    try:
        document = orjson.loads(begun)
        response |= document["response"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    code = error.told_code or error.code
    response |= {"status": "failed", "error": {"code": code, "message": error.message, "retry": error.retry}}
    if used is not None:
        response["usage"] = {"input_tokens": used[0], "output_tokens": used[1], "total_tokens": sum(used)}
    return b"event: response.failed\ndata: %b\n\n" % orjson.dumps({"type": "response.failed", "response": response})
