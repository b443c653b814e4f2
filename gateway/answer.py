"""What the gateway says itself: JSON and error answers, and the status lines of relayed ones.

Answers are written to the client's transport as bytes; aiohttp's response objects are used for nothing on this
server. So every answer says HTTP/1.1, names no version of any software, and costs one write.
"""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from time import time
from typing import Any, Final

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11

from gateway.errors import GatewayError, render, render_event
from gateway.exchange import Exchange

STATUS_LINES: Final[dict[int, bytes]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_FIXED: Final = b"Server: llm-gateway\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"


class _Date:
    """The Date of answers that have none: our own, and those of runtimes that say none (RFC 9110 section 6.6.1).

    The line is made once a second.
    """

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time())
        if second != self._second:
            self._second = second
            self._line = f"Date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


date_line: Final = _Date().line

#: Where a request keeps its Exchange.
EXCHANGE: Final = web.RequestKey("exchange", Exchange)

Headers = tuple[tuple[str, str], ...]


class Sent(web.StreamResponse):
    """A response whose bytes are already with the client's transport.

    aiohttp's server asks it for nothing but whether the connection lives on.
    """

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


#: For relayed answers, whose status the Exchange knows: shared, since a Sent carries no state of its request.
SENT_KEEP: Final = Sent(200, keep_alive=True)
SENT_CLOSE: Final = Sent(200, keep_alive=False)


def status_line(status: int) -> bytes:
    line = STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d \r\n" % status


def connection_line(request: web.BaseRequest, keep_alive: bool) -> bytes:
    """The Connection header a client of this HTTP version must be told, if any."""
    if not keep_alive:  # said to old clients too: bytes that were no request count as HTTP/1.0
        return b"Connection: close\r\n"
    return b"" if request.version >= HttpVersion11 else b"Connection: keep-alive\r\n"


def send(
    request: web.BaseRequest,
    body: bytes,
    status: int = 200,
    headers: Headers = (),
    content_type: str = "application/json",
    *,
    close: bool = False,
) -> Sent:
    """Answer with `body` once the exchange is settled. `headers` are trusted: ours or from configuration, not a
    client's.
    """
    keep_alive = bool(request.keep_alive) and not close
    exchange = request.get(EXCHANGE)  # none where the bytes never became a request
    if exchange is not None:
        headers = (*headers, ("X-Request-Id", exchange.id))
        exchange.response_bytes = len(body)
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")
    if exchange is not None:
        lines += exchange.headers
    head = b"%b%b%bContent-Type: %b\r\n%b%bContent-Length: %d\r\n\r\n" % (
        status_line(status),
        date_line(),
        _FIXED,
        content_type.encode(),
        lines,
        connection_line(request, keep_alive),
        len(body),
    )
    answer = head if request.method == "HEAD" else head + body
    if exchange is not None:
        exchange.unsent = (answer,)
    elif request.transport is not None:
        request.transport.write(answer)
    return Sent(status, keep_alive=keep_alive)


def send_json(request: web.BaseRequest, document: Any, status: int = 200, headers: Headers = ()) -> Sent:
    return send(request, orjson.dumps(document), status, headers)


def send_error(
    request: web.BaseRequest, error: GatewayError, exchange: Exchange | None, *, close: bool = False
) -> Sent:
    """The error in the client's API family, with what a client needs to act on it."""
    headers = list(error.headers)
    if error.retry_after_s is not None:
        headers.append(("Retry-After", str(max(1, round(error.retry_after_s)))))
    if error.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    body = render(error) if exchange is None else render(error, exchange.family, exchange.id)
    return send(request, body, error.status, tuple(headers), close=close)


# -- streams that the gateway begins itself, because the answer is not there yet -----------------------------------


def send_comment(request: web.BaseRequest, exchange: Exchange, text: bytes = b"waiting") -> None:
    """A comment in the stream of events that the client asked for; the first one commits to the stream's head."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return
    chunked = request.version >= HttpVersion11
    line = b": %b\n\n" % text
    if chunked:
        line = b"%x\r\n%b\r\n" % (len(line), line)
    if not exchange.head_sent:
        exchange.head_sent = True
        line = b"%b%b%bContent-Type: text/event-stream; charset=utf-8\r\nX-Request-Id: %b\r\n%b%b%b\r\n%b" % (
            status_line(200),
            date_line(),
            _FIXED,
            exchange.id.encode(),
            exchange.headers,
            connection_line(request, bool(request.keep_alive) and chunked),
            b"Transfer-Encoding: chunked\r\n" if chunked else b"",
            line,
        )
    transport.write(line)


def send_last_event(request: web.BaseRequest, error: GatewayError, exchange: Exchange) -> Sent:
    """End a stream that had nothing but comments with the family's error event: its client was told 200, and waits."""
    event = render_event(error, exchange.family, exchange.id)
    chunked = request.version >= HttpVersion11
    exchange.unsent = (b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event,)
    exchange.response_bytes = len(event)
    return SENT_CLOSE
