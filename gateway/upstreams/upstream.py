"""One upstream address: where it is, what speaks there, how it feels, and the load this process put on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from gateway.routing.breaker import Breaker
from gateway.routing.load import Lease as Counted
from gateway.routing.load import Load
from gateway.routing.prefix import Index, Prompt
from gateway.runtimes import Runtime

HealthStatus = Literal["unknown", "ok", "degraded", "unreachable"]

#: a host that is there has taken the connection by then; one that has not is not asked as long as others are there
SUSPECT_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Health:
    """The last probe's finding. `latency_s` is the probe's round trip, None where nothing answered; `gone`: there was
    nobody to connect to, which one probe can tell, while one that is not answered may have met a busy moment.
    """

    status: HealthStatus = "unknown"
    reason: str = "not probed yet"
    latency_s: float | None = None
    checked_at: float = 0.0  # monotonic seconds
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits on one exchange with an upstream, in seconds; None switches one off.

    `first_byte_s`: from the request sent to the first byte of the answer's body, since several runtimes send the
    headers long before the model has said anything. `idle_s`: between two pieces of an answer; comment lines do not
    count. `total_s`: from the request sent to the end of the answer.
    """

    connect_s: float = 5.0
    first_byte_s: float | None = 600.0
    idle_s: float | None = 60.0
    total_s: float | None = None


class Upstream:
    """An address and its live counters. Survives configuration reloads by provider, runtime and address; what else is
    configured changes in place.

    `base_url` is the OpenAI base as configured ("http://host:8000/v1"); `prefix` is its path without a trailing
    slash ("/v1"), and `root` what stands before a final "/v1" ("").
    `address`, an IP address, is connected to instead of `host`, which is then only a name: one of several behind it.
    """

    __slots__ = (
        "address",
        "api_key",
        "base_url",
        "breaker",
        "cache_tokens",
        "dialling",
        "dialling_at",
        "draining",
        "failed",
        "health",
        "held",
        "host",
        "load",
        "loaded",
        "max_in_flight",
        "models",
        "name",
        "netloc",
        "on_room",
        "port",
        "prefix",
        "provider",
        "retired",
        "root",
        "runtime",
        "scheme",
        "slots",
        "tells_loaded",
        "timeouts",
        "told",
        "weight",
        "windows",
    )

    def __init__(
        self,
        name: str,
        provider: str,
        runtime: Runtime,
        base_url: str,
        address: str = "",
        *,
        api_key: str = "",
        timeouts: Timeouts | None = None,
        weight: int = 1,
        max_in_flight: int | None = None,
        index: Index | None = None,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{base_url!r} is no http(s) URL with a host")
        self.name = name
        self.provider = provider
        self.runtime = runtime
        self.base_url = base_url
        self.scheme = url.scheme
        self.host = url.hostname
        self.address = address or url.hostname
        self.port = url.port or (443 if url.scheme == "https" else 80)
        #: the Host header we send: ours, never the client's (Ollama answers 403 to a foreign one)
        self.netloc = url.netloc.rpartition("@")[2]
        self.prefix = url.path.rstrip("/")
        self.root = self.prefix.removesuffix("/v1")
        self.api_key = api_key
        self.timeouts = timeouts or Timeouts()
        self.weight = weight
        self.health = Health()
        #: model names the upstream itself reports, from the last probe that could tell
        self.models: tuple[str, ...] = ()
        #: those of them that are in memory now, where the runtime tells (Ollama)
        self.loaded: frozenset[str] = frozenset()
        self.tells_loaded = False
        #: tokens a model can take here, by name, where the runtime tells
        self.windows: Mapping[str, int] = {}
        #: requests the runtime runs at once, where it tells (llama.cpp)
        self.slots: int | None = None
        #: what its prefix cache holds, as configured or as it says; None until it was asked, 0 if it does not say
        self.cache_tokens: int | None = None
        self.draining = False  # an operator's wish: it gets no new request
        self.retired = False  # no longer configured: what runs on it ends, and then its connections are closed
        #: what this process put on it, and learned of its speed and its cache
        self.load = Load(index)
        #: requests it takes at once, as configured; else its `slots`, and where it tells none, any number
        self.max_in_flight = max_in_flight
        self.held = 0  # room given to requests that waited for it, until they take their lease
        #: told of each lease that ends, while somebody waits for room here
        self.on_room: Callable[[Upstream], None] | None = None
        self.failed = 0
        self.breaker = Breaker()
        #: the header line that names it to the client
        self.told = b""
        self.rename(name)
        self.dialling = 0  # connections being opened
        self.dialling_at = 0.0  # since when no such connection came about, 0.0 while none is being opened

    def suspect(self, now: float) -> bool:
        """Whether connections to it hang: it may be gone without a word, and each request sent there would wait."""
        return self.dialling > 0 and now - self.dialling_at > SUSPECT_S

    def size_cache(self, tokens: int) -> None:
        """Its prefix cache holds `tokens`, 0 if that is not known."""
        if tokens and tokens != self.cache_tokens:
            self.load.index.resize(tokens)
        self.cache_tokens = tokens

    def rename(self, name: str) -> None:
        """Call it this from now on: a reload may tell it from others, or need not any more."""
        self.name = name
        self.told = b"x-gateway-upstream: %b\r\n" % name.encode("ascii", "backslashreplace")

    @property
    def in_flight(self) -> int:
        return self.load.streams

    @property
    def served(self) -> int:
        """Leases ever given."""
        return self.load.served

    @property
    def limit(self) -> int | None:
        """Requests it takes at once; None is any number."""
        return self.max_in_flight if self.max_in_flight is not None else self.slots

    def has_room(self) -> bool:
        limit = self.max_in_flight
        if limit is None:
            limit = self.slots
            if limit is None:
                return True
        return self.load.streams + self.held < limit

    @property
    def identity(self) -> str:
        """What it is called where gateways speak of it to each other; its `name` may change with a reload."""
        return f"{self.provider} {self.scheme}://{self.place}{self.prefix}"

    @property
    def place(self) -> str:
        """Host and port that are connected to."""
        if self.address == self.host:
            return self.netloc
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def url(self, path: str) -> str:
        """Absolute URL of `path`, which starts at the root ("/api/tags", "/v1/models", "/health")."""
        return f"{self.scheme}://{self.place}{self.root}{path}"

    def lease(
        self,
        uncached: int = 0,
        now: float = 0.0,
        model: str = "",
        prompt: Prompt | None = None,
        *,
        loads: bool = False,
        streamed: bool = True,
    ) -> Lease:
        """Count one request on this upstream from now until the lease is left; see `routing.load.Lease`."""
        lease = Lease(self.load, uncached, now, model, prompt, loads=loads, streamed=streamed)
        lease.upstream = self
        return lease

    def __repr__(self) -> str:
        state = f"{self.health.status} in_flight={self.in_flight}"
        return f"<Upstream {self.name} {self.runtime.name} {self.base_url} {state}>"


class Lease(Counted):
    """Load counted at selection, so that the next choice sees it already, and dropped exactly once."""

    __slots__ = ("upstream",)

    upstream: Upstream | None

    def release(self, now: float | None = None) -> None:
        super().release(now)
        upstream, self.upstream = self.upstream, None
        if upstream is not None and upstream.on_room is not None:
            upstream.on_room(upstream)
