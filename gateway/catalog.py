"""What can be asked for: providers, models and aliases, compiled into a route table that is swapped whole.

`Catalog` owns the live Upstream objects, which outlive every table; `rebuild` makes a new `Table` from the
configuration and from what the upstreams said they serve. A model that several upstreams offer is one pool; behind
it stand the pools of the models it falls back on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import NamedTuple

from gateway.config import Lookup, Model, Provider
from gateway.routing.prefix import Bound, Index
from gateway.runtimes import RUNTIMES, Runtime
from gateway.upstreams.upstream import Upstream

_NEAR = 3


class Place(NamedTuple):
    """What makes an upstream the same one."""

    provider: str
    runtime: str
    base_url: str
    address: str


class Host(NamedTuple):
    """One host of a provider. `address`: where to connect, if that is not what the base URL names."""

    base_url: str
    address: str = ""
    weight: int = 1


class Offer:
    """A model at one upstream: what is asked of whom. `heads` caches request heads by operation; `quiet_until`: the
    upstream asked to be left alone with this model until then (monotonic seconds).
    """

    __slots__ = ("heads", "model", "quiet_until", "upstream")

    def __init__(self, model: Model, upstream: Upstream, quiet_until: float = 0.0) -> None:
        self.model = model
        self.upstream = upstream
        self.heads: dict[str, bytes] = {}
        self.quiet_until = quiet_until

    @property
    def unloaded(self) -> bool:
        """The upstream must load the model before it answers."""
        upstream = self.upstream
        return upstream.tells_loaded and self.model.name not in upstream.loaded

    def __repr__(self) -> str:
        return f"<Offer {self.model.name} at {self.upstream.name}>"


Tiers = tuple[tuple[Offer, ...], ...]


class Listed:
    """A provider as it stands now: configured or discovered models, and its addresses."""

    __slots__ = ("hint", "models", "name", "runtime", "upstreams")

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        models: tuple[Model, ...],
        upstreams: tuple[Upstream, ...],
        hint: str = "",
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.models = models
        self.upstreams = upstreams
        self.hint = hint


class Pools:
    """Names a client may use, each with the offers behind it; made once, then read only.

    `tiers[name]` is the name's own pool and then those of the models it falls back on, nearest first; no offer is in
    two of them. The own pool is empty where no host is known now, as while a host name resolves to nothing.
    """

    __slots__ = ("models", "tiers")

    def __init__(self, offered: Iterable[tuple[Model, Sequence[Offer]]]) -> None:
        pools: dict[str, list[Offer]] = {}
        #: by name, the models behind it
        self.models: dict[str, list[Model]] = {}
        for model, offers in offered:
            for name in (model.name, *model.aliases):
                pools.setdefault(name, []).extend(offers)
                self.models.setdefault(name, []).append(model)
        self.tiers: dict[str, Tiers] = {name: self._tiers(name, pools) for name in pools}

    def __getitem__(self, name: str) -> tuple[Offer, ...]:
        return self.tiers[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiers)

    def __len__(self) -> int:
        return len(self.tiers)

    def items(self) -> Iterator[tuple[str, tuple[Offer, ...]]]:
        return ((name, tiers[0]) for name, tiers in self.tiers.items())

    def _tiers(self, name: str, pools: Mapping[str, list[Offer]]) -> Tiers:
        own = tuple(pools[name])
        tiers = [own]
        chain = [name]
        for at in chain:  # grows while it is read: first a model's own fallbacks, then theirs
            for model in self.models.get(at, ()):
                chain += [other for other in model.fallbacks if other not in chain]
        seen = set(own)
        for other in chain[1:]:
            offers = tuple(offer for offer in pools.get(other, ()) if offer not in seen)
            if offers:
                tiers.append(offers)
                seen.update(offers)
        return tuple(tiers)


class Table:
    """Immutable: `pools` has every name a client may use, `by_provider` those at each provider alone."""

    __slots__ = ("by_provider", "pools", "providers")

    def __init__(
        self,
        providers: Iterable[Listed],
        discovered: Mapping[Upstream, frozenset[str]],
        quiet: Mapping[tuple[str, Upstream], float],
    ) -> None:
        self.providers = tuple(providers)
        offered: list[tuple[Model, Sequence[Offer]]] = []
        self.by_provider: dict[str, Pools] = {}
        for provider in self.providers:
            own: list[tuple[Model, Sequence[Offer]]] = [
                (
                    model,
                    [
                        Offer(model, upstream, quiet.get((model.name, upstream), 0.0))
                        for upstream in provider.upstreams
                        # one host of a discovered provider may not have it
                        if upstream not in discovered or model.name in discovered[upstream]
                    ],
                )
                for model in provider.models
            ]
            self.by_provider[provider.name] = Pools(own)
            offered += own
        self.pools = Pools(offered)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that look like `name`, best first."""
    return difflib.get_close_matches(name[:200], list(names), n=_NEAR, cutoff=0.5)


class Catalog:
    """The providers of a configuration, their upstreams, and the current `table`.

    An upstream is the same as long as its provider's name, its address and its runtime are: it goes on with its load,
    its health and all that was learned of it, whatever else a reload changes.
    """

    def __init__(self, providers: Iterable[Provider], index_bytes: int = 64 * 1024 * 1024) -> None:
        self._bound = Bound(index_bytes)
        self._providers: tuple[Provider, ...] = ()
        self._upstreams: dict[str, tuple[Upstream, ...]] = {}
        self._known: dict[Place, Upstream] = {}
        self._found: dict[Lookup, tuple[Host, ...]] = {}
        self._drained: frozenset[str] = frozenset()
        self.table = Table((), {}, {})
        self.configure(providers)

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        return tuple(upstream for upstreams in self._upstreams.values() for upstream in upstreams)

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The names that are to be looked up."""
        return tuple(dict.fromkeys(lookup for provider in self._providers for lookup in provider.lookups))

    def configure(self, providers: Iterable[Provider]) -> None:
        """Serve these providers from now on. Upstreams that are no longer among them get no new request."""
        self._providers = tuple(providers)
        self._found = {lookup: self._found[lookup] for lookup in self.lookups if lookup in self._found}
        self._place()

    def found(self, lookup: Lookup, hosts: Iterable[Host]) -> None:
        """These hosts are behind that name now."""
        self._found[lookup] = tuple(hosts)
        self._place()

    def drain(self, identities: Iterable[str]) -> None:
        """The upstreams with these identities are drained, now and when they come; the others are not."""
        self._drained = frozenset(identities)
        for upstream in self.upstreams:
            upstream.draining = upstream.identity in self._drained

    def rebuild(self) -> None:
        """Compile a new table from what is known now, and swap it in."""
        self.table = self._build()

    def dispensable(self, upstream: Upstream) -> bool:
        """Whether each name that `upstream` serves has another host that is not gone, be it one to fall back on."""
        for tiers in self.table.pools.tiers.values():
            hosts = {offer.upstream for tier in tiers for offer in tier}
            if upstream in hosts and all(host is upstream or host.breaker.gone for host in hosts):
                return False
        return True

    def _place(self) -> None:
        """Make the upstreams what the configuration and the names looked up say, and compile the table."""
        placed: dict[str, tuple[Upstream, ...]] = {}
        known: dict[Place, Upstream] = {}
        for provider in self._providers:
            hosts = dict.fromkeys(Host(url) for url in provider.base_urls)
            hosts |= dict.fromkeys(host for lookup in provider.lookups for host in self._found.get(lookup, ()))
            several = len(hosts) > 1 or bool(provider.lookups)
            names: set[str] = set()
            for host in hosts:
                place = Place(provider.name, provider.runtime, host.base_url, host.address)
                if place in known:
                    continue
                upstream = self._known.get(place) or Upstream(
                    provider.name,
                    provider.name,
                    RUNTIMES[provider.runtime or "openai"],
                    host.base_url,
                    host.address,
                    index=Index(self._bound),
                )
                known[place] = upstream
                upstream.rename(_unique(upstream, names) if several else provider.name)
                if upstream.retired:
                    upstream.retired = False
                    upstream.breaker.found_well(monotonic())
                upstream.api_key = provider.api_key.value
                upstream.timeouts = provider.timeouts
                upstream.max_in_flight = provider.max_in_flight
                if provider.cache_tokens is not None:
                    upstream.size_cache(provider.cache_tokens)
                upstream.weight = provider.weight * host.weight
                upstream.draining = upstream.identity in self._drained
                names.add(upstream.name)
                placed[provider.name] = (*placed.get(provider.name, ()), upstream)
            placed.setdefault(provider.name, ())
        for place, upstream in self._known.items():
            if place not in known:
                if not upstream.retired:
                    upstream.retired = True
                    # Who chose it before this goes elsewhere if there is anybody else.
                    upstream.breaker.found_gone(monotonic())
                if upstream.in_flight:  # it may be named again before its last answer has ended
                    known[place] = upstream
        self._known = known
        self._upstreams = placed
        self.table = self._build()

    def _build(self) -> Table:
        listed = []
        discovered: dict[Upstream, frozenset[str]] = {}
        for provider in self._providers:
            upstreams = self._upstreams[provider.name]
            runtime = RUNTIMES[provider.runtime or "openai"]
            models = provider.models
            hint = ""
            if provider.discover:
                models = _discovered(upstreams)
                for upstream in upstreams:
                    discovered[upstream] = frozenset(upstream.models)
                if not models:
                    hint = f"{provider.name!r} was asked for its models and has named none yet"
            elif not models:
                hint = (
                    f"no models are configured for {provider.name!r}: list them under `models` of its entry "
                    f"({provider.origin}), or leave `models` out to ask the server"
                )
            listed.append(Listed(provider.name, runtime, models, upstreams, hint))
        return Table(listed, discovered, self._quiet())

    def _quiet(self) -> dict[tuple[str, Upstream], float]:
        """By model and upstream, until when it asked to be left alone: a new table is no reason to ask earlier."""
        pools = self.table.by_provider.values()
        offers = {offer for one in pools for tiers in one.tiers.values() for offer in tiers[0] if offer.quiet_until}
        return {(offer.model.name, offer.upstream): offer.quiet_until for offer in offers}


def _unique(upstream: Upstream, taken: set[str]) -> str:
    """The provider's name and the host; where two share the host with their paths, whose slashes fit into no URL."""
    name = f"{upstream.provider}@{upstream.place}"
    return name if name not in taken else name + upstream.prefix.replace("/", ".")


def _discovered(upstreams: tuple[Upstream, ...]) -> tuple[Model, ...]:
    """The union of what the upstreams serve, in the order first heard."""
    names = dict.fromkeys(name for upstream in upstreams for name in upstream.models)
    return tuple(
        Model(
            name=name,
            ui_name=name,
            # Ollama lists names with their tag and also answers to the bare name.
            aliases=(name.removesuffix(":latest"),) if name.endswith(":latest") else (),
        )
        for name in names
    )
