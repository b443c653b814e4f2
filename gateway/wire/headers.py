"""Which headers and targets may pass, in either direction.

Requests go upstream by allow-list: what a client sends is not for the runtime unless it is named here. Answers come
back by refusal: a new header of a runtime reaches the client unless it is about this hop, about the upstream's own
place (addresses, accounts, cookies, cross-origin rules), or ours to set. RFC 9110, section 7.6.1 (hop-by-hop).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gateway.errors import BadRequest, UpstreamBroken

REQUEST_PASS = frozenset(
    {
        "accept",  # some runtimes choose between SSE and JSON by it
        "traceparent",  # W3C Trace Context: the runtime's spans join the client's trace
        "tracestate",
        "anthropic-version",  # these three change what the body means
        "anthropic-beta",
        "openai-beta",
    }
)

ANSWER_HEAD_BYTES = 64 * 1024

_HOP_BY_HOP = (
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-authentication-info",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
_RESPONSE_DROP = frozenset(
    {
        *_HOP_BY_HOP,
        "content-length",  # framing is this hop's own
        "cache-control",  # replaced below, and its companions
        "expires",
        "pragma",
        "age",
        "x-content-type-options",
        "x-request-id",  # ours
        "request-id",
        "server",  # what runs behind us is nobody's business
        "via",
        "x-powered-by",
        "location",  # names the upstream's address; redirects are not followed
        "content-location",
        "www-authenticate",  # about our credential, not the client's
        "authentication-info",
        "openai-organization",
        "openai-project",
        "set-cookie",  # the upstream must not act on the browser in the name of our origin
        "set-cookie2",
        "clear-site-data",
        "refresh",
        "alt-svc",
        "strict-transport-security",
        "public-key-pins",
        "nel",
        "report-to",
        "reporting-endpoints",
        "timing-allow-origin",
    }
)
_RESPONSE_DROP_PREFIXES = (b"access-control-", b"x-litellm-", b"llm_provider-", b"x-ratelimit-")
_RESPONSE_KNOWN = ("content-type", "date", "vary", "x-accel-buffering", "retry-after", "content-encoding")
_ADDED = b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"

_PASS, _DROP, _CONNECTION, _ENCODING = 1, 2, 3, 4


def _spellings(name: str) -> tuple[bytes, bytes]:
    return name.encode(), name.title().encode()


# Looked up by the raw name as most software writes it; any other spelling is lower-cased first.
_REQUEST_NAMES = {raw: name.encode() for name in REQUEST_PASS for raw in _spellings(name)}
_RESPONSE_NAMES = {raw: _PASS for name in _RESPONSE_KNOWN for raw in _spellings(name)}
_RESPONSE_NAMES |= {raw: _DROP for name in _RESPONSE_DROP for raw in _spellings(name)}
_RESPONSE_NAMES |= dict.fromkeys(_spellings("connection"), _CONNECTION)
_RESPONSE_NAMES |= dict.fromkeys(_spellings("content-encoding"), _ENCODING)

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
#: every byte a header line may hold; obs-text (0x80 and above) passes as it came
_FINE = bytes(byte for byte in range(256) if byte >= 32 and byte != 127) + b"\t"

_PLAIN_TARGET = re.compile(rb"(?:/[\w-]+)+(?:\?[\w=&.-]*)?")
_BAD_PATH = re.compile(
    rb"(?P<control>[^\x21-\x7e]|%[01][0-9a-f]|%7f)|(?P<backslash>\\|%5c)|(?P<fragment>#)"
    rb"|(?P<slash>//|%2f)|(?P<dot>/\.\.?(?:/|\Z)|%2e)",
    re.IGNORECASE,
)
_BAD_QUERY = re.compile(rb"(?P<control>[^\x21-\x7e])|(?P<fragment>#)")
_PROBLEMS = {
    "control": "it holds a control character, a space or a byte outside ASCII",
    "backslash": "it holds a backslash",
    "slash": "it holds an empty segment or an encoded slash",
    "dot": "it holds a dot segment or an encoded dot",
    "fragment": "it holds a fragment",
}


def request_headers(items: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The client's headers that go upstream, names in lower case, values as they came, in order.

    Raises BadRequest for a name with `_`, which servers that map names to variables mistake for `-`, and for control
    characters in a value that would pass.
    """
    passed = [(name, value) for raw, value in items if (name := _verdicts[raw])]
    for _, value in passed:
        if value.translate(None, _FINE):
            raise BadRequest("A header value holds a control character.", code="invalid_header")
    return passed


def underscore_refused() -> BadRequest:
    """For a header name with "_": behind CGI and WSGI it cannot be told from the same with "-"."""
    return BadRequest("A header name with an underscore is refused: write '-'.", code="invalid_header")


class _Verdicts(dict[bytes, bytes]):
    """Header name as it came -> name to send, b"" for one that stays here.

    Remembered, up to a bound: clients are few, and send the same names with every request.
    """

    def __missing__(self, raw: bytes) -> bytes:
        if 95 in raw:
            raise underscore_refused()
        name = _REQUEST_NAMES.get(raw.lower(), b"")
        if len(self) < 1024:
            self[raw] = name
        return name


_verdicts = _Verdicts()


def response_headers(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """The upstream's headers as lines for the client (`Name: value\\r\\n` each), ours among them.

    The caller adds framing (Content-Length or Transfer-Encoding), Connection, x-request-id and the rate-limit
    headers. Raises UpstreamBroken for control characters, a name that is none, and heads beyond 64 KiB.
    """
    return _response_headers(pairs, frozenset())


def _response_headers(pairs: list[tuple[bytes, bytes]], named: frozenset[bytes]) -> bytes:
    lines = []
    for name, value in pairs:
        action = _RESPONSE_NAMES.get(name) or _action(name)
        if action == _DROP or (named and name.lower() in named):
            continue
        if action == _PASS:
            lines.append(name + b": " + value)
        elif action == _CONNECTION:
            options = frozenset(option.strip() for option in value.lower().split(b","))
            if not options <= named | {b"keep-alive", b"close", b""}:
                return _response_headers(pairs, named | options)
        elif value.strip().lower() not in (b"identity", b""):
            # Its tokens could not be counted, and the client did not say that it could read it.
            raise UpstreamBroken("The upstream compressed its answer, though asked not to: switch that off there.")
    text = b"".join(lines)
    if len(text) > ANSWER_HEAD_BYTES:
        raise UpstreamBroken("The upstream's answer has more than 64 KiB of headers.")
    if text.translate(None, _FINE):
        raise UpstreamBroken("The upstream's answer has a control character in a header.")
    lines.append(_ADDED)
    return b"\r\n".join(lines)


def _action(name: bytes) -> int:
    lower = name.lower()
    action = _RESPONSE_NAMES.get(lower)
    if action is not None:
        return action
    if lower.startswith(_RESPONSE_DROP_PREFIXES):
        return _DROP
    if _TOKEN.fullmatch(name) is None:
        raise UpstreamBroken("The upstream's answer has a header name that is none.")
    return _PASS


def raw_target_problem(target: str | bytes, host: str | bytes = b"") -> str | None:
    """What is wrong with a request target (RFC 9112, section 3.2) as it came on the wire; None if nothing is.

    Paths are refused rather than normalised: two parsers would do it in two ways. The query may hold what it likes
    but controls. The absolute form passes only where its authority is `host`, the request's Host header.
    """
    raw = target.encode("utf-8", "surrogateescape") if isinstance(target, str) else target
    if _PLAIN_TARGET.fullmatch(raw) is not None:
        return None
    path, question, query = raw.partition(b"?")
    if not path.startswith(b"/"):
        scheme, separator, rest = path.partition(b"://")
        authority, slash, path = rest.partition(b"/")
        asked = host.encode("utf-8", "surrogateescape") if isinstance(host, str) else host
        if scheme.lower() not in (b"http", b"https") or not separator or not authority:
            return "it does not begin with '/'"
        if authority.lower() != asked.lower():
            return "its authority is not the Host"
        path = slash + path
    found = _BAD_PATH.search(path) or (_BAD_QUERY.search(query) if question else None)
    return None if found is None else _PROBLEMS[found.lastgroup or "control"]
