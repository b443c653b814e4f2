"""Why an exchange on the control plane failed: the error class, and the reason in words an operator can act on."""

from __future__ import annotations

import errno
from typing import Final

import aiohttp
import orjson

from gateway.errors import UpstreamBroken, UpstreamError, UpstreamTimeout, UpstreamUnreachable

_REASON_MAX: Final = 200  # characters


class TooLarge(Exception):
    """A body went over its cap of `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes


#: what the client library raises when an exchange fails (TimeoutError is an OSError)
FOREIGN: Final = (aiohttp.ClientError, OSError, TooLarge)


def explain(error: BaseException, timeout_s: float) -> tuple[type[UpstreamError], str]:
    """The error class and the reason in words for something `FOREIGN`."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable, f"DNS: the name {error.host!r} cannot be resolved"
    if isinstance(error, aiohttp.ClientSSLError):
        return UpstreamUnreachable, f"TLS: {_clean(str(error))}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamUnreachable, "no connection in time"
    if isinstance(error, TimeoutError):
        return UpstreamTimeout, f"timed out after {timeout_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        if error.os_error.errno == errno.ECONNREFUSED:
            return UpstreamUnreachable, "connection refused"
        return UpstreamUnreachable, _clean(error.os_error.strerror or str(error.os_error))
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return UpstreamBroken, "closed the connection without an answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return UpstreamBroken, "the answer was cut"
    if isinstance(error, aiohttp.ClientResponseError):
        return UpstreamBroken, "the answer is not valid HTTP"
    if isinstance(error, TooLarge):
        return UpstreamBroken, f"the answer is larger than {error.limit_bytes // 2**20} MiB"
    if isinstance(error, OSError) and error.strerror:
        return UpstreamBroken, _clean(error.strerror)
    return UpstreamBroken, _clean(str(error)) or type(error).__name__


def error_text(body: bytes) -> str:
    """The message in an error body of any family, "" where there is none; one line of at most 200 characters.

    Shapes seen: `{"error": {"message"}}`, `{"error": "text"}`, `{"detail": "text"}`, `{"message": "text"}`.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(document, dict):
        return ""
    told = document.get("error") or document.get("detail") or document.get("message")
    if isinstance(told, dict):
        told = told.get("message")
    return _clean(told) if isinstance(told, str) else ""


def _clean(text: str) -> str:
    """One line without control characters, for logs and answers."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _REASON_MAX]).split())
    return line if len(line) <= _REASON_MAX else line[: _REASON_MAX - 1] + "…"
