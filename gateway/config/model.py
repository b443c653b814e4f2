"""What a configuration is: frozen data, no behaviour beyond masking secrets and naming addresses.

The defaults of all settings live here and nowhere else; `settings.py` reads them off these fields.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gateway.limits.spec import Limit
from gateway.oidc.grants import Grant
from gateway.routing.policies import DEFAULT
from gateway.upstreams.upstream import Timeouts

_KNOWN_PREFIX = re.compile(r"llmgw_|sk-|hf_|gsk_|")
_LONG_SECRET_CHARS = 24


class Secret:
    """A credential that cannot be printed by accident: `repr` and `str` show a mask, `value` is the text.

    A long secret shows a well-known prefix and its last four characters ("sk-…9f3c"), so that an operator can
    tell two apart; a short one shows nothing. Equality takes constant time. False if empty.
    """

    __slots__ = ("value",)

    value: str

    def __init__(self, value: str) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Secret does not change")

    def __str__(self) -> str:
        if not self.value:
            return ""
        if len(self.value) < _LONG_SECRET_CHARS:
            return "…"
        prefix = _KNOWN_PREFIX.match(self.value)
        return f"{prefix[0] if prefix else ''}…{self.value[-4:]}"

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        mine, theirs = (
            self.value.encode("utf-8", "surrogatepass"),
            other.value.encode("utf-8", "surrogatepass"),
        )
        return hmac.compare_digest(mine, theirs)

    def __hash__(self) -> int:
        return hash(self.value)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self.value,)


@dataclass(frozen=True, slots=True)
class Price:
    """Currency units per million tokens, and per second of GPU time; None is "not known", never zero."""

    input: float | None = None
    cached_input: float | None = None
    output: float | None = None
    gpu_second: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """`name` is what the upstream is asked for (`apiName`); `aliases` are further names clients may use.

    `fallbacks` name the models, or aliases, that are asked when no host of this one can answer, first one first; then
    theirs. `continues`: whether its engines can go on with an answer that another began; None: as the runtime does.
    """

    name: str
    ui_name: str
    supports_tools: bool = True
    aliases: tuple[str, ...] = ()
    context_window: int | None = None  # tokens
    price: Price | None = None
    fallbacks: tuple[str, ...] = ()
    continues: bool | None = None
    policy: str = ""  # a name in POLICIES; "" for the gateway's


@dataclass(frozen=True, slots=True)
class Lookup:
    """A DNS name that stands for several hosts. `kind` "host": every A and AAAA address of the base URL's host is one;
    "srv": the base URL's host is the name of SRV records, which have hosts and ports (RFC 2782).
    """

    kind: Literal["host", "srv"]
    base_url: str

    def __str__(self) -> str:
        return f"{'dns' if self.kind == 'host' else 'srv'}+{self.base_url}"


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of `OPENAI_COMPATIBLE_DATA`: a name, one or more addresses, and the models served there.

    `base_urls` are OpenAI bases without a trailing slash ("http://host:8000/v1"), `lookups` names behind which there
    are more. `runtime` is a name in RUNTIMES, or "" for a generic OpenAI-compatible server. `discover`: `models` was
    left out, so the upstream is asked. `origin` names the configuration entry in words an operator can search for
    ("environment OPENAI_COMPATIBLE_DATA[0]", "gateway.toml:providers[1]"). `max_in_flight`: requests each address
    takes at once, `cache_tokens` what its prefix cache holds; None leaves that to what the runtime says of itself.
    """

    name: str
    base_urls: tuple[str, ...]
    runtime: str = ""
    api_key: Secret = field(default_factory=lambda: Secret(""))
    models: tuple[Model, ...] = ()
    discover: bool = False
    weight: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    origin: str = "default"
    max_in_flight: int | None = None
    cache_tokens: int | None = None
    lookups: tuple[Lookup, ...] = ()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A group of keys, and its share of a full fleet: `weight` beside another's."""

    group: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"weight {self.weight:g}"


@dataclass(frozen=True, slots=True)
class Listen:
    """A TCP address to listen on. `host` has no brackets; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


#: (device, inode, modified at in ns, size in bytes) of a file; None if it is not there
Mark = tuple[int, int, int, int] | None
#: the files that were read, and what they were then
Files = Mapping[Path, Mark]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration.

    `path` is where ("OPENAI_COMPATIBLE_DATA[0].runtime"), `origin` the source that holds it (".env:12"),
    `value` what stood there as text, left out where it may hold a secret, `nearest` the nearest valid name.
    """

    path: str
    message: str
    value: str = ""
    hint: str = ""
    nearest: str = ""
    origin: str = ""

    def __str__(self) -> str:
        text = f"{self.path} = {self.value}: {self.message}" if self.value else f"{self.path}: {self.message}"
        if self.nearest:
            text += f"; did you mean {self.nearest}?"
        if self.hint:
            text += f" ({self.hint})"
        return text


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds everything found wrong, never only the first."""

    def __init__(self, problems: tuple[Problem, ...], files: Files | None = None) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems
        self.files: Files = files or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The effective configuration. Frozen: a reload makes a new one.

    `origins` maps the path of each value ("listen", "providers[0].weight") to where it came from.
    """

    data_dir: Path
    listen: Listen = Listen("127.0.0.1", 8700)
    metrics_listen: Listen | None = Listen("127.0.0.1", 9464)
    redis_url: Secret = field(default_factory=lambda: Secret(""))  # may hold a password
    store: Literal["auto", "embedded", "off"] = "auto"
    api_keys: tuple[tuple[str, Secret], ...] = ()
    auth_failures_per_min: int = 10  # wrong keys from one address, twice as many at once; 0 is no limit
    oidc_issuer: str | None = None  # None: API keys only
    oidc_audience: tuple[str, ...] = ()
    oidc_jwks_url: str | None = None  # None: the issuer's discovery document names it
    oidc_algorithms: tuple[str, ...] = ("RS256", "ES256")
    oidc_leeway_s: float = 30.0  # how far the issuer's clock may be off
    oidc_name_claim: str = "sub"
    oidc_group_claim: str | None = None
    oidc_grants: tuple[Grant, ...] = ()  # every token of the issuer for the audience, with no role
    limits: tuple[Limit, ...] = ()
    limits_share: float = 1.0  # of each limit, what this process grants alone while the store is away
    queue_s: float = 60.0  # longest wait for room on an upstream; 0: nobody waits
    queue_max: int = 1000  # requests that wait at once
    #: what a token of a prompt and one of an answer count against a tenant, while others wait
    queue_input_weight: float = 1.0
    queue_output_weight: float = 2.0
    queue_reserve: int = 4  # places kept for tenants within their share, while others want all; a twentieth at most
    comment_s: float = 15.0  # between the comments to a stream that has nothing to say yet; 0 is off
    tenants: tuple[Tenant, ...] = ()
    providers: tuple[Provider, ...] = ()
    providers_file: Path | None = None  # holds further ones
    dns_refresh_s: float = 10.0  # longest time between two look-ups of a name; an answer's TTL may shorten it
    dns_server: Listen | None = None  # asked instead of the system's resolver
    ollama_base_url: str | None = None  # native root without /api: "http://localhost:11434"
    enable_pull: bool = False
    tools_unsupported: Literal["strip", "reject"] = "strip"
    max_body_bytes: int = 64 * 1024 * 1024
    body_timeout_s: float = 60.0
    min_body_rate: int = 1024  # bytes per second a client must keep up while sending its body; 0 is off
    keepalive_timeout_s: float = 30.0
    #: how long a pooled upstream connection may idle: uvicorn and llama.cpp close theirs after 5 s
    upstream_idle_s: float = 4.0
    attempts: int = 4  # upstreams that one request may be sent to, the first included
    policy: str = DEFAULT  # a name in POLICIES
    cache_salt: Literal["group", "key", "off"] = "group"  # whose prompts share a vLLM's prefix cache
    prefix_index_bytes: int = 64 * 1024 * 1024
    retry_budget: float = 0.1  # part of the requests that may be sent once more
    hedge_after_s: float | None = None  # without a word for so long, a second upstream is asked as well; None: never
    continue_streams: bool = True
    shutdown_s: float = 30.0
    drain_notice_s: float = 5.0  # a part of it, in which requests are still taken
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = True
    ledger: bool = True
    ledger_keep_bytes: int = 256 * 1024 * 1024  # of journals, where there is no store
    demo: Literal["auto", "on", "off"] = "auto"
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    files: Files = field(default_factory=dict, compare=False, repr=False)
