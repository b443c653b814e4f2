"""Readers of single values: text or a TOML/JSON value in, the typed value out, or `Refused` with the reason.

Messages complete the sentence "<path>: …" and never repeat the value; the collector adds it where it may be
shown.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

from gateway.config.model import Listen, Lookup, Problem, Secret, Tenant
from gateway.errors import BadRequest
from gateway.identity import fields
from gateway.limits.spec import Limit, SpecError, parse_limits
from gateway.oidc import issuer
from gateway.oidc.grants import Grant, parse_grants
from gateway.store import address

LOOPBACK: Final = "127.0.0.1"
SECONDS_MAX: Final = 1_000_000.0
NAME_MAX_CHARS: Final = 200

_SHOWN_CHARS: Final = 80
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)
_URL_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*/?", re.ASCII)
_SWITCH: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
#: what people paste after the base URL
_OPERATIONS: Final = (
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/models",
    "/chat",
    "/responses",
    "/messages",
    "/rerank",
)


class Refused(ValueError):
    """A value that cannot be used. `shown` replaces the value in the problem's text; None shows it."""

    def __init__(self, message: str, *, hint: str = "", nearest: str = "", shown: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.nearest = nearest
        self.shown = shown


class Collector:
    """Everything found wrong, in the order of reading."""

    __slots__ = ("problems", "warnings")

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def refuse(self, path: str, origin: str, refused: Refused, value: object = None) -> None:
        shown = refused.shown if refused.shown is not None else show(value)
        self.problems.append(Problem(path, refused.message, shown, refused.hint, refused.nearest, origin))

    def add(self, path: str, origin: str, message: str, *, hint: str = "", nearest: str = "") -> None:
        self.problems.append(Problem(path, message, "", hint, nearest, origin))

    def warn(self, path: str, origin: str, message: str, *, hint: str = "", nearest: str = "") -> None:
        self.warnings.append(Problem(path, message, "", hint, nearest, origin))


def show(value: object) -> str:
    """`value` for a problem's text: scalars as written, cut short; containers by kind, lest they hold a key."""
    match value:
        case str():
            text = value if len(value) <= _SHOWN_CHARS else value[: _SHOWN_CHARS - 1] + "…"
            return repr(text)
        case bool():
            return "true" if value else "false"
        case int():
            return str(value) if abs(value) < 10**30 else "a very large number"
        case float() | None:
            return "null" if value is None else repr(value)
        case dict():
            return "an object"
        case list():
            return "a list"
    return f"a {type(value).__name__}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name closest to `name`, ignoring case, or "" if none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in valid}
    found = difflib.get_close_matches(name[:NAME_MAX_CHARS].casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else ""


def switch(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in _SWITCH:
        return _SWITCH[raw.lower()]
    raise Refused("must be true or false", hint="true, false, 1, 0, yes, no, on, off")


def boolean(raw: object) -> bool:
    """A JSON or TOML boolean; a quoted "false" is a mistake worth telling, not a value."""
    if isinstance(raw, bool):
        return raw
    unquoted = raw.lower() if isinstance(raw, str) and raw.lower() in ("true", "false") else ""
    raise Refused("must be true or false without quotes", nearest=unquoted)


def choice(*names: str) -> Callable[[object], str]:
    def parse(raw: object) -> str:
        if isinstance(raw, bool):  # TOML: demo = true
            raw = "on" if raw else "off"
        if isinstance(raw, str) and raw.lower() in names:
            return raw.lower()
        near = nearest(raw, names) if isinstance(raw, str) else ""
        raise Refused(f"must be one of {', '.join(names)}", nearest=near)

    return parse


def whole(low: int, high: int) -> Callable[[object], int]:
    def parse(raw: object) -> int:
        if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", raw):
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
            raise Refused(f"must be a whole number from {low} to {high}")
        return raw

    return parse


def number(*, above: float = -1.0, most: float = SECONDS_MAX, unit: str = "") -> Callable[[object], float]:
    """A finite number greater than `above` (the default allows zero, not less) and at most `most`."""
    bounds = f"{'greater than 0' if above == 0 else '0 or more'}, at most {most:g}"

    def parse(raw: object) -> float:
        if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", raw):
            raw = float(raw)
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise Refused(f"must be a number{unit}: {bounds}")
        if not math.isfinite(raw) or raw > most or raw <= above or raw < 0:
            raise Refused(f"must be {bounds}{unit}")
        return float(raw)

    return parse


def seconds_or_off(raw: object) -> float | None:
    """A number of seconds greater than 0, or off."""
    if raw is False or (isinstance(raw, str) and raw.lower() in ("off", "no", "false", "none")):
        return None
    try:
        return number(above=0.0, unit=" (seconds)")(raw)
    except Refused as problem:
        raise Refused(f"{problem}, or off") from None


def name(raw: object) -> str:
    """A name shown to clients and used as a metric label: 1 to 200 printable characters, not padded."""
    if not isinstance(raw, str):
        raise Refused("must be text in quotes")
    if not raw or raw != raw.strip():
        raise Refused("must not be empty or begin or end with a space")
    if len(raw) > NAME_MAX_CHARS or not raw.isprintable():
        raise Refused(f"must be at most {NAME_MAX_CHARS} printable characters")
    return raw


def directory(raw: object) -> Path:
    if not isinstance(raw, str) or not raw.strip() or not raw.isprintable():
        raise Refused("must be the path of a directory")
    try:
        return Path(raw).expanduser()
    except RuntimeError:
        raise Refused("names a home directory that does not exist") from None


def limits(raw: object) -> tuple[Limit, ...]:
    """The array of limits, in JSON or as TOML has it."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused("must be a JSON array of limits") from None
    try:
        return parse_limits(raw)
    except SpecError as error:
        raise Refused(str(error), shown="") from None


def tenants(raw: object) -> tuple[Tenant, ...]:
    """Groups and their weights: {"research": {"weight": 3}}."""
    rule = 'must be an object of groups: {"research": {"weight": 3}}'
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(rule) from None
    if not isinstance(raw, dict):
        raise Refused(rule)
    found = []
    for group, document in raw.items():
        if not isinstance(document, dict) or set(document) != {"weight"}:
            raise Refused(rule, shown="")
        try:
            named = fields.FIELDS["group"](group, 0.0)
            found.append(Tenant(named, fields.FIELDS["weight"](document["weight"], 0.0)))
        except BadRequest as error:
            raise Refused(error.message, shown="") from None
    return tuple(found)


def trusted_url(raw: object) -> str:
    """A URL to the letter: an issuer's is compared with what its tokens say."""
    if not isinstance(raw, str) or not re.fullmatch(r"[!-~]{1,2000}", raw) or not issuer.trusted_url(raw):
        raise Refused("must be a URL with https://, or http:// on this machine")
    return raw


def texts(raw: object) -> tuple[str, ...]:
    """Texts separated by commas, or an array of them."""
    parts = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part for part in parts):
        raise Refused("must be one or more texts, separated by commas")
    return tuple(dict.fromkeys(parts))


def algorithms(raw: object) -> tuple[str, ...]:
    found = tuple(issuer.modern(one) for one in texts(raw))
    for one in found:
        if one not in issuer.ALGORITHMS:
            near = nearest(one, issuer.ALGORITHMS)
            raise Refused(f"must be of {', '.join(issuer.ALGORITHMS)}", nearest=near)
    return found


def grants(raw: object) -> tuple[Grant, ...]:
    """The array of grants, in JSON or as TOML has it."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused("must be a JSON array of grants") from None
    try:
        return parse_grants(raw)
    except BadRequest as error:
        raise Refused(error.message, shown="") from None


def listen(raw: object, usual_port: int = 8700) -> Listen:
    """ "host:port", "[ipv6]:port", ":port" or a port; without a host it is the loopback address."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = str(raw)
    if not isinstance(raw, str):
        raise Refused('must be "host:port"')
    if "://" in raw:
        raise Refused('must be "host:port", without a scheme', nearest=raw.partition("://")[2].rstrip("/"))
    found = re.fullmatch(r"(?:(\[[^\[\]]*\]|[^:\[\]]*):)?([0-9]{1,9})", raw)
    if found is None:
        if raw.count(":") > 1 and "[" not in raw:
            raise Refused("an IPv6 address stands in brackets", hint=f"[::1]:{usual_port}")
        missing = f"{raw}:{usual_port}" if _HOST.fullmatch(raw) else ""
        raise Refused('must be "host:port"', nearest=missing)
    host, port = found[1] or LOOPBACK, int(found[2])
    if host == "*":
        raise Refused("must name an address", nearest=f"0.0.0.0:{port}", hint="0.0.0.0 is every IPv4 address")
    if port > 65535:
        raise Refused("the port must be 0 to 65535")
    if not valid_host(host):
        raise Refused("the host is not an address or a host name")
    return Listen(host.strip("[]"), port)


def listen_or_off(raw: object) -> Listen | None:
    if raw is False or (isinstance(raw, str) and raw.lower() in ("off", "no", "false", "none")):
        return None
    if isinstance(raw, str) and ":" not in raw and nearest(raw, ("off",)):
        raise Refused('must be "host:port" or off', nearest="off")
    return listen(raw, usual_port=9464)


def valid_host(host: str) -> bool:
    """A host name, an IPv4 address, or an IPv6 address in brackets."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        elif re.fullmatch(r"[0-9.]+", host):
            ipaddress.IPv4Address(host)
        else:
            return len(host) <= 253 and _HOST.fullmatch(host) is not None
    except ValueError:
        return False
    return True


def base_url(raw: object) -> str:
    """An http(s) base URL, without a trailing slash, its scheme and host in lower case."""
    if not isinstance(raw, str):
        raise Refused('must be a URL in quotes, such as "http://localhost:8000/v1"')
    if not re.fullmatch(r"[!-~]+", raw):
        raise Refused("must be a URL of ASCII characters without spaces", shown="")
    if "://" not in raw:
        bare = re.fullmatch(
            r"(?:localhost|[a-z0-9-]+(?:\.[a-z0-9-]+)+|[a-z0-9.-]+(?=:[0-9]))(?::[0-9]{1,5})?(/[a-z0-9/]*)?",
            raw,
        )
        raise Refused(
            "has no scheme",
            nearest=f"http://{raw}" if bare else "",
            shown=None if bare else "",
            hint="http:// or https://",
        )
    try:
        url = urlsplit(raw)
        port = url.port
    except ValueError:
        raise Refused("is not a URL: its host or port cannot be read", shown="") from None
    shown = _without_secrets(url)
    if url.scheme not in ("http", "https"):
        raise Refused(
            "must begin with http:// or https://", nearest=nearest(url.scheme, ("http", "https")), shown=shown
        )
    if "@" in url.netloc:
        raise Refused("must not hold credentials", hint="put the key into apiKey", shown=shown)
    if "?" in raw or "#" in raw:
        raise Refused("must have no query and no fragment", shown=shown)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname or ""
    if port == 0 or not valid_host(host):
        raise Refused("names no valid host and port", shown=shown)
    if not _URL_PATH.fullmatch(url.path) or {".", ".."} & set(url.path.split("/")):
        raise Refused("has a path with empty, dotted or escaped parts", shown=shown)
    path = url.path.rstrip("/")
    root = f"{url.scheme}://{host}{'' if port is None else f':{port}'}"
    for operation in _OPERATIONS:
        if path.endswith(operation):
            raise Refused("must be the base, not one operation", nearest=root + path.removesuffix(operation))
    return root + path


def base_address(raw: object) -> str | Lookup:
    """A base URL, or with "dns+" or "srv+" before it the name of several hosts."""
    if not isinstance(raw, str) or not raw.startswith(("dns+", "srv+")):
        return base_url(raw)
    url = base_url(raw[4:])
    if raw.startswith("dns+"):
        return Lookup("host", url)
    if urlsplit(url).port is not None:
        raise Refused("has a port, and SRV records bring their own", nearest=re.sub(r":[0-9]+(?=/|$)", "", raw))
    return Lookup("srv", url)


def file(raw: object) -> Path:
    if not isinstance(raw, str) or not raw.strip() or not raw.isprintable():
        raise Refused("must be the path of a file")
    try:
        return Path(raw).expanduser()
    except RuntimeError:
        raise Refused("names a home directory that does not exist") from None


def dns_server(raw: object) -> Listen | None:
    """ "address:port", or off for the system's resolver."""
    if raw is False or (isinstance(raw, str) and raw.lower() in ("off", "no", "false", "none")):
        return None
    if isinstance(raw, str) and valid_host(raw) and ":" not in raw:
        raw = f"{raw}:53"
    server = listen(raw, usual_port=53)
    try:
        ipaddress.ip_address(server.host)
    except ValueError:
        raise Refused("must be an IP address with a port", hint="it is what finds names") from None
    return server


def redis_url(raw: object) -> Secret:
    """The URL of a Redis or Valkey, as `gateway.store.address` understands it. Never shown: it may hold a password."""
    if not isinstance(raw, str) or not re.fullmatch(r"[!-~]+", raw):
        raise Refused("must be a URL of ASCII characters without spaces", shown="")
    try:
        address.parse(raw)
    except ValueError as error:
        raise Refused(str(error), shown="", hint="redis://host:6379/0") from None
    return Secret(raw)


def _without_secrets(url: SplitResult) -> str:
    host = ("…@" if "@" in url.netloc else "") + url.netloc.rpartition("@")[2]
    return show(f"{url.scheme}://{host}{url.path}{'?…' if url.query else ''}{'#…' if url.fragment else ''}")


def header_text(raw: object) -> str:
    """A credential as it stands in a header: visible ASCII, no spaces; may be empty. Never shown."""
    if not isinstance(raw, str):
        raise Refused("must be text in quotes", shown="")
    if raw and not re.fullmatch(r"[!-~]+", raw):
        raise Refused("must be visible ASCII characters without spaces or line ends", shown="")
    return raw
