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

_END: Final = re.compile(
    rb'"finish_reason"\s*:\s*"(?!")|"done"\s*:\s*true|"type"\s*:\s*"(?:message_stop|response\.(?:completed|incomplete))"'
)


def opening(data: bytes, *, lines: bool, ended: bool = False) -> bytes | None:
    """The data of the first event in `data` that is content, an end or an error; None if there is none yet.

    `lines`: NDJSON, else server-sent events. `ended`: nothing follows, so the last one needs no end of its own.
    """
    splitter = NdjsonSplitter() if lines else SseSplitter()
    events = splitter.feed(data)
    if ended:
        events.append(splitter.rest())
    seen = 0
    for event in events:
        said = event.strip() if lines else parse_event(event)[1].strip()
        if not said:
            continue
        if said[0] != 123 or CONTENT.search(said) or TOOL_CALL.search(said) or b'"error"' in said or _END.search(said):
            return said
        seen += 1
        if seen == EVENTS_MAX:
            return said
    return None


def fault(said: bytes) -> str | None:
    """What an event says went wrong with the engine; None for any other event, and for an error that is the request's
    own (a code of 4xx but 429), which no other engine would judge differently.
    """
    if b'"error"' not in said or CONTENT.search(said):
        return None
    try:
        document = orjson.loads(said)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("choices"):
        return None
    error = document.get("error")
    if not error:
        return None
    if not isinstance(error, dict):
        return str(error)[:200]
    code = str(error.get("code") or error.get("status") or "")
    if len(code) == 3 and code[0] == "4" and code != "429":
        return None
    return str(error.get("message") or error.get("type") or "an error")[:200]
