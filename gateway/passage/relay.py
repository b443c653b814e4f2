"""relay: the commit point. The answer's bytes go to the client, through the meter, and nothing is sent twice.

The bytes are written to the client's transport right where they were read from the upstream. A body that came whole
is one write with its head. A stream is a chunk for each read; backpressure of the client stops the reading of the
upstream. Where the upstream fails, another may go on with the answer (`continuation`); else the failure becomes the API
family's error event, never something that looks like an end.

Only the end of an answer (all of one that came whole, a stream's last chunk) is left in `exchange.unsent`: it goes out
when the record of the request is in the journal.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web
from aiohttp.http import HttpVersion11

from gateway.answer import SENT_CLOSE, SENT_KEEP, connection_line, date_line, status_line
from gateway.continuation.meter import Stopped
from gateway.errors import UpstreamBroken, UpstreamError, UpstreamInterrupted, render_event
from gateway.exchange import Exchange
from gateway.ledger import prices
from gateway.passage.continuation import Continuation
from gateway.upstreams.reply import Reply
from gateway.wire.tokens import answer_usage
from gateway.wire.usage import Meter, SseMeter, new_meter

if TYPE_CHECKING:
    from gateway.server import ClientProtocol

_LAST_CHUNK: Final = b"0\r\n\r\n"
_COMMENT: Final = ord(":")


def relay_whole(
    request: web.BaseRequest, exchange: Exchange, reply: Reply, strip_usage: bool
) -> web.StreamResponse | None:
    """Send a complete reply: one write. Raises only while nothing has been sent. None, and nothing is sent, for a
    stream that broke off: that is `relay`'s.
    """
    fields = _fields(reply)
    _take_status(exchange, reply)
    data = reply.body()
    if not reply.streaming and reply.status < 300:
        exchange.usage = answer_usage(data)  # most answers: read in one pass, no meter needed
    if exchange.usage is None:
        meter = exchange.meter = new_meter(reply.head.content_type, strip_usage)
        if data:
            data = meter.feed(data, reply.first_byte_at)
        data += meter.finish()
        if reply.streaming and not meter.finished and reply.status == 200:
            return None
        if meter.error is not None and reply.status < 400:  # an error status is an answer, not a failure in one
            _note_error(exchange, meter)
    keep_alive = _keep_alive(request)
    _tell_cost(exchange)
    bodiless = reply.status in (204, 304)  # RFC 9110 section 8.6
    framing = b"" if bodiless else b"Content-Length: %d\r\n" % len(data)
    head = _head(exchange, reply.status, fields, keep_alive, request, framing)
    transport = request.transport
    if transport is None or transport.is_closing():
        raise asyncio.CancelledError
    exchange.committed = True
    exchange.unsent = (head + data,) if len(data) < 65536 else (head, data)
    exchange.response_bytes = len(data)
    return SENT_KEEP if keep_alive else SENT_CLOSE


def settle_usage(exchange: Exchange) -> None:
    """Take the meter's final word, or its estimate, if usage is not known yet, and charge for it. Without a model
    nothing was used.
    """
    meter = exchange.meter
    if meter is not None and exchange.usage is None and (exchange.status < 400 or exchange.outcome == "client_gone"):
        exchange.usage = meter.result(exchange.prompt_estimate)
    if exchange.usage is not None and exchange.cost is None:
        exchange.cost = prices.cost(exchange.usage, exchange.upstream_s, exchange.price)


def _tell_cost(exchange: Exchange) -> None:
    """Charge a whole answer and say so in its head. A stream's head leaves before its cost is known, and a price for
    time is known when the upstream is left: for both the record has it.
    """
    price = exchange.price
    usage = exchange.usage
    if price is None or usage is None or price.gpu_second is not None:
        return
    exchange.cost = prices.cost(usage, 0.0, price)
    if exchange.cost is not None:
        exchange.headers += b"x-gateway-cost: %b\r\n" % prices.decimal(exchange.cost).encode()


async def relay(
    request: web.BaseRequest, exchange: Exchange, reply: Reply, strip_usage: bool, kept: Continuation | None = None
) -> web.StreamResponse:
    """Send a reply while it comes. Raises only while nothing has been sent, or when the client has gone.

    `kept`: another upstream may go on with this answer.
    """
    fields = _fields(reply)
    meter: Meter = new_meter(reply.head.content_type, strip_usage)
    exchange.meter = meter
    _take_status(exchange, reply)
    transport = request.transport
    if transport is None or transport.is_closing():
        raise asyncio.CancelledError
    client = cast("ClientProtocol", request.protocol)
    keep_alive = _keep_alive(request)
    # The upstream's length holds only if nothing will be taken out; a meter that strips needs chunks.
    length = None if reply.streaming else reply.head.content_length
    chunked = length is None and request.version >= HttpVersion11
    if length is not None:
        framing = b"Content-Length: %d\r\n" % length
    elif chunked:
        framing = b"Transfer-Encoding: chunked\r\n"
    else:
        framing = b""
        keep_alive = False
    head = _head(exchange, reply.status, fields, keep_alive, request, framing)
    exchange.committed = True
    if not exchange.head_sent:  # while the client waited
        transport.write(head)

    feed = meter.feed if kept is None else kept.feed(meter)
    write = transport.write
    closing = transport.is_closing
    sent_bytes = 0

    def sink(data: bytes) -> None:
        nonlocal sent_bytes
        now = monotonic()
        # A runtime's keep-alive comment is no sign of life of its model; what comes with one may be.
        if data[0] != _COMMENT or data.find(b"\ndata") >= 0:
            reply.moved_at = now
        data = feed(data, now)
        if not data or closing():
            return
        sent_bytes += len(data)
        if chunked:
            write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            write(data)

    def send(data: bytes) -> None:
        nonlocal sent_bytes
        if data:
            sent_bytes += len(data)
            write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    whole = False  # though it broke off: what failed behind its finish took nothing from it
    try:
        while True:
            client.on_pause = reply.pause
            client.on_resume = reply.resume
            try:
                reply.attach(sink)
                if client.writing_paused:  # already full, by the answer before on this connection
                    reply.pause()
                await reply.ended()
                tail = meter.finish()
                if reply.streaming and not meter.finished and meter.error is None and reply.status == 200:
                    raise _unfinished(exchange)
                break
            except Stopped as stopped:
                tail = stopped.rest
                break
            except UpstreamError as error:
                broken = error
            exchange.error = broken
            exchange.outcome = "partial"
            if closing():
                raise asyncio.CancelledError  # nobody is there to be told
            if not reply.streaming or meter.torn:
                transport.abort()  # half a JSON document has no place for an error: nobody may take it for whole
                return SENT_CLOSE
            if isinstance(broken, UpstreamInterrupted):
                send(broken.rest)
            resumed = None if kept is None else await kept.go_on(request, broken, meter)
            if resumed is None:
                if kept is not None and kept.reason:
                    broken.message += f"; nobody else could go on: {kept.reason}"
                send(_last_event(exchange, reply, meter, broken))
                if chunked:
                    exchange.unsent = (_LAST_CHUNK,)
                return SENT_CLOSE
            exchange.error, exchange.outcome = None, "ok"
            if isinstance(resumed, bytes):
                tail = resumed
                whole = True
                break
            reply, meter = resumed
            exchange.meter = meter
            feed = kept.feed(meter)  # type: ignore[union-attr]  # it was kept that resumed
    finally:
        client.on_pause = client.on_resume = None
        exchange.response_bytes = sent_bytes
    if meter.error is not None and not whole and reply.status < 400:
        _note_error(exchange, meter)
    if closing():
        raise asyncio.CancelledError
    if tail:
        exchange.response_bytes += len(tail)
        exchange.unsent = (b"%x\r\n" % len(tail), tail, b"\r\n", _LAST_CHUNK) if chunked else (tail,)
    elif chunked:
        exchange.unsent = (_LAST_CHUNK,)
    return SENT_KEEP if keep_alive else SENT_CLOSE


def _last_event(exchange: Exchange, reply: Reply, meter: Meter, error: UpstreamError) -> bytes:
    """The error in the form of the stream: a line where lines are streamed, an event where events are; and what the
    answer has used until now.
    """
    lines = reply.head.content_type.lower().startswith(b"application/x-ndjson")
    usage = meter.result(exchange.prompt_estimate)
    used = (usage.prompt, usage.completion)
    begun = meter.begun if exchange.family == "responses" and isinstance(meter, SseMeter) else b""
    return render_event(error, "ollama" if lines else exchange.family, exchange.id, used, begun)


def _take_status(exchange: Exchange, reply: Reply) -> None:
    exchange.status = reply.status
    if reply.status >= 500:
        exchange.outcome = "upstream_error"


def _unfinished(exchange: Exchange) -> UpstreamBroken:
    return UpstreamBroken(
        f"provider {exchange.provider!r} ended its stream before the answer was finished", code="upstream_incomplete"
    )


def _note_error(exchange: Exchange, meter: Meter) -> None:
    """The upstream reported its own failure inside a 200 stream; the client has been told in the same words."""
    exchange.error = UpstreamError(
        f"provider {exchange.provider!r} failed in the middle of its answer", code="upstream_stream_error"
    )
    exchange.outcome = "partial"


def _keep_alive(request: web.BaseRequest) -> bool:
    return bool(request.keep_alive)


def _fields(reply: Reply) -> bytes:
    """The header lines of the upstream's answer for the client. Raises UpstreamBroken for what must not pass."""
    lines = reply.head.client_lines()
    return lines if reply.head.dated else lines + date_line()


def _head(
    exchange: Exchange, status: int, fields: bytes, keep_alive: bool, request: web.BaseRequest, framing: bytes
) -> bytes:
    return b"%b%bX-Request-Id: %b\r\n%b%b%b\r\n" % (
        status_line(status),
        fields,
        exchange.id.encode(),
        exchange.headers,
        connection_line(request, keep_alive),
        framing,
    )
