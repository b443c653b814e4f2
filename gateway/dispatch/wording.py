"""wording: what is sent to an upstream: the client's body, spliced where it must differ, and a head of our own."""

from __future__ import annotations

from typing import Final

import orjson

from gateway import __version__
from gateway.catalog import Offer
from gateway.dispatch.plan import Plan
from gateway.errors import BadRequest
from gateway.wire.body import Body, usage_options

#: streams that tell their usage when asked to; the others tell it anyway
_TELL_IF_ASKED: Final = frozenset({"chat", "completions"})
_USER_AGENT: Final = b"local-llm-gateway/" + __version__.encode()


def patched(plan: Plan, offer: Offer, body: Body) -> bytes:
    """`body` for this offer: the client's bytes, spliced only where they must differ."""
    replace = plan.replace
    remove = plan.remove
    model = offer.model
    salted = plan.cache_salt and offer.upstream.runtime.cache_salt
    if not (replace or remove or body.stream or salted) and body.model == model.name:
        plan.strip_usage = False
        return body.raw
    if salted and not (replace or remove or body.stream) and body.model == model.name and not body.has("cache_salt"):
        plan.strip_usage = False  # most that is not streamed
        return body.extended(b'"cache_salt":"%b"' % plan.cache_salt.encode())
    if body.model != model.name:
        replace = {**replace, "model": orjson.dumps(model.name)}
    if salted:  # the client's own is replaced
        replace = {**replace, "cache_salt": b'"%b"' % plan.cache_salt.encode()}
    plan.strip_usage = False
    native = plan.native and plan.native in offer.upstream.runtime.paths
    streamed = replace.get("stream", b"true" if body.stream else b"false") == b"true"
    asking = plan.operation in _TELL_IF_ASKED and offer.upstream.runtime.inject_usage
    if streamed and asking and not native and not body.include_usage:
        plan.strip_usage = True
        replace = {**replace, "stream_options": usage_options(body)}
    if not replace and not remove:
        return body.raw
    return body.patch(replace, remove)


def request_head(plan: Plan, offer: Offer, request_id: str, length: int) -> bytes:
    """The request's head up to and with its empty line."""
    operation = plan.operation
    runtime = offer.upstream.runtime
    if plan.native and plan.native in runtime.paths:
        operation = plan.native
    head = offer.heads.get(operation)
    if head is None:
        head = offer.heads[operation] = _fixed_head(offer, operation)
    extra = b"".join([b"%b: %b\r\n" % pair for pair in plan.headers]) if plan.headers else b""
    return b"%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (head, extra, request_id.encode(), length)


def _fixed_head(offer: Offer, operation: str) -> bytes:
    upstream = offer.upstream
    target = upstream.runtime.target(upstream.prefix, operation)
    if target is None:
        raise BadRequest(
            f"{upstream.runtime.title} ({upstream.provider!r}) has no route for this request",
            status=404,
            code="operation_not_supported",
        )
    lines = [
        f"POST {target} HTTP/1.1".encode(),
        b"Host: " + upstream.netloc.encode("idna" if not upstream.netloc.isascii() else "ascii"),
        b"User-Agent: " + _USER_AGENT,
        b"Content-Type: application/json",
        b"Accept-Encoding: identity",
    ]
    if upstream.api_key:  # set by us, last word: the client's own credential never passes
        lines.append(b"Authorization: Bearer " + upstream.api_key.encode())
    return b"\r\n".join(lines) + b"\r\n"
