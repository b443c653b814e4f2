"""When a streamed answer has begun: the first event that gives the client something.

An engine says a role, an empty delta or a comment long before its model has said a word, and may then still die or
report an error. Until the first content, the end, or an error, nothing has to be passed on, and another engine can be
asked instead.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from gateway.wire.meter import CONTENT, TOOL_CALL
from gateway.wire.ndjson import NdjsonSplitter
from gateway.wire.sse import SseSplitter, parse_event

#: events without a known content after which a stream is passed on as it is: a dialect of its own, or progress reports
EVENTS_MAX: Final = 16

_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"(?!")')
_ANNOUNCED: Final = re.compile(rb'"type"\s*:\s*"response\.(?:created|queued|in_progress)"')
_END: Final = re.compile(rb'"done"\s*:\s*true|"type"\s*:\s*"(?:message_stop|response\.(?:completed|incomplete))"')


def opening(data: bytes, *, lines: bool, ended: bool = False) -> bytes | None:
    """The data of the first event in `data` that is content, an end or an error; None if there is none yet.

    `lines`: NDJSON, else server-sent events. `ended`: nothing follows, so the last one needs no end of its own.
    """
    if lines or 13 in data:
        splitter = NdjsonSplitter() if lines else SseSplitter()
        events = splitter.feed(data)
        last = splitter.rest()
    else:  # as every runtime writes them
        events = data.split(b"\n\n")
        last = events.pop()
    if ended:
        events.append(last)
    seen = 0
    for event in events:
        said = event.strip() if lines else parse_event(event)[1].strip()
        if not said:
            continue
        if (said[0] != 123 or CONTENT.search(said) or _decides(said)) and not _announces(said):
            return said
        seen += 1
        if seen == EVENTS_MAX:
            return said
    return None


def _announces(said: bytes) -> bool:
    """Whether an event of Responses repeats the request, and the members of an answer that are empty still."""
    return b'"response.' in said and _ANNOUNCED.search(said) is not None


def _decides(said: bytes) -> bool:
    """Whether an event without text says something all the same; `in` is ten times as fast as a pattern."""
    return (
        b'"error"' in said
        or (b"_call" in said and TOOL_CALL.search(said) is not None)
        or (b'"finish_reason":null' not in said and _FINISH.search(said) is not None)
        or ((b'"done"' in said or b'"type"' in said) and _END.search(said) is not None)
    )


def reported(said: bytes) -> object | None:
    """The error that an event reports, an object or a text; None for any other event."""
    if b'"error"' not in said or CONTENT.search(said):
        return None
    try:
        document = orjson.loads(said)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("choices"):
        return None
    failed = document.get("response")
    error = document.get("error") or (failed.get("error") if isinstance(failed, dict) else None)
    if not error and document.get("type") == "error":  # of Responses: the event is the error
        return document
    return error or None


def fault(said: bytes) -> str | None:
    """What an event says went wrong with the engine; None for any other event, and for an error that is the request's
    own (a code of 4xx but 429), which no other engine would judge differently.
    """
    error = reported(said)
    if error is None:
        return None
    if not isinstance(error, dict):
        return str(error)[:200]
    code = str(error.get("code") or error.get("status") or "")
    if len(code) == 3 and code[0] == "4" and code != "429":
        return None
    if not code and error.get("type") == "invalid_request_error":  # Anthropic's have no code
        return None
    return str(error.get("message") or error.get("type") or "an error")[:200]
