"""REDIS_URL understood. Pure: a text in, an Address or ValueError out.

    redis://[user:password@]host[:6379][/db]        rediss:// the same over TLS
    unix://[user:password@]/path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:26379],host2[:26379]/master[/db][?sentinel_password=...]
    redis+cluster://[user:password@]host[:6379],host2[:6379]

`valkey` may stand for `redis`, and `rediss+sentinel`, `rediss+cluster` for TLS. With TLS these may follow as a query:
ssl_ca_certs, ssl_certfile, ssl_keyfile (paths), ssl_cert_reqs (required or none), ssl_check_hostname (true or false).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote

_URL = re.compile(r"(?:redis|valkey)(s?)(\+sentinel|\+cluster)?://|(unix)://", re.IGNORECASE)
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::([0-9]{1,5}))?")
_PORTS: Final = {"single": 6379, "cluster": 6379, "sentinel": 26379}
_TLS_PATHS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

Shape = Literal["single", "unix", "sentinel", "cluster"]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is. `tls` holds redis-py's `ssl_*` options, and is None without TLS. `str` shows no password."""

    shape: Shape
    nodes: tuple[tuple[str, int], ...] = ()  # of a Sentinel deployment: the sentinels
    path: str = ""  # of the Unix socket
    master: str = ""  # the name that Sentinel knows it by
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] | None = field(default=None, hash=False)

    def __str__(self) -> str:
        if self.shape == "unix":
            return f"unix://{self.path}"
        nodes = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        kind = "" if self.shape == "single" else f"+{self.shape}"
        name = f"/{self.master}" if self.master else ""
        return f"redis{'' if self.tls is None else 's'}{kind}://{nodes}{name}" + (f"/{self.db}" if self.db else "")


def parse(url: str) -> Address:
    """Read a URL. ValueError completes the sentence "the URL …" and repeats nothing of it: it may hold a password."""
    scheme = _URL.match(url)
    if scheme is None:
        raise ValueError("must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://")
    rest, _, query_text = url[scheme.end() :].partition("?")
    query = dict(parse_qsl(query_text, keep_blank_values=True))
    user, at, place = rest.rpartition("@")
    username, colon, password = user.partition(":")
    options: dict[str, Any] = {
        "username": unquote(username) or None,
        "password": unquote(password) if colon else None,
    }
    if at and not colon:
        raise ValueError("holds a user name without a password: user:password@ or :password@")
    if scheme[3]:
        address = _unix(place, query, options)
    else:
        kind: Any = (scheme[2] or "+single")[1:].lower()
        address = _network(kind, place, query, {**options, "tls": _tls(query) if scheme[1] else None})
    if query:
        raise ValueError(f"has an unknown option: {next(iter(query))[:40]!r}")
    return address


def _unix(place: str, query: dict[str, str], options: dict[str, Any]) -> Address:
    if not place.startswith("/"):
        raise ValueError("names no absolute path of a socket")
    return Address("unix", path=unquote(place), db=_db(query.pop("db", "")), **options)


def _network(shape: Shape, place: str, query: dict[str, str], options: dict[str, Any]) -> Address:
    hosts, _, path = place.partition("/")
    nodes = tuple(_node(one, _PORTS[shape]) for one in hosts.split(","))
    if shape == "single" and len(nodes) > 1:
        raise ValueError("names several hosts: use redis+sentinel:// or redis+cluster://")
    if shape == "cluster":
        if path.strip("/") or "db" in query:
            raise ValueError("names a database, and a Cluster has only one")
        return Address(shape, nodes, **options)
    if shape == "sentinel":
        master, _, path = path.partition("/")
        if not master:
            raise ValueError("names no master: redis+sentinel://host:26379/master-name")
        options["master"] = unquote(master)
        options["sentinel_password"] = query.pop("sentinel_password", None)
    return Address(shape, nodes, db=_db(query.pop("db", "") or path), **options)


def _node(text: str, usual_port: int) -> tuple[str, int]:
    found = _NODE.fullmatch(text)
    if found is None or not 0 < int(found[3] or usual_port) < 65536:
        raise ValueError("names no valid host and port")
    return found[1] or found[2], int(found[3] or usual_port)


def _db(text: str) -> int:
    if not re.fullmatch(r"[0-9]{0,4}", text):
        raise ValueError("names a database that is no number")
    return int(text or 0)


def _tls(query: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {name: query.pop(name) for name in _TLS_PATHS if name in query}
    requirement = query.pop("ssl_cert_reqs", "required")
    if requirement not in ("required", "none"):
        raise ValueError("has an ssl_cert_reqs that is neither required nor none")
    check = query.pop("ssl_check_hostname", "true" if requirement == "required" else "false").lower()
    if check not in ("true", "false"):
        raise ValueError("has an ssl_check_hostname that is neither true nor false")
    return {**options, "ssl_cert_reqs": requirement, "ssl_check_hostname": check == "true"}
