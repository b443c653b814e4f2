"""What can be asked for: providers, models and aliases, compiled into a route table that is swapped whole.

`Catalog` owns the live Upstream objects, which outlive every table; `rebuild` makes a new `Table` from the
configuration and from what the upstreams said they serve. A model that several upstreams offer is one pool; behind
it stand the pools of the models it falls back on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from gateway.config import Model, Provider
from gateway.runtimes import RUNTIMES, Runtime
from gateway.upstreams.upstream import Upstream

_NEAR = 3


class Offer:
    """A model at one upstream: what is asked of whom. `heads` caches request heads by operation; `quiet_until`: the
    upstream asked to be left alone with this model until then (monotonic seconds).
    """

    __slots__ = ("heads", "model", "quiet_until", "upstream")

    def __init__(self, model: Model, upstream: Upstream) -> None:
        self.model = model
        self.upstream = upstream
        self.heads: dict[str, bytes] = {}
        self.quiet_until = 0.0

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

    def __init__(self, providers: Iterable[Listed], discovered: Mapping[Upstream, frozenset[str]]) -> None:
        self.providers = tuple(providers)
        offered: list[tuple[Model, Sequence[Offer]]] = []
        self.by_provider: dict[str, Pools] = {}
        for provider in self.providers:
            own: list[tuple[Model, Sequence[Offer]]] = [
                (
                    model,
                    [
                        Offer(model, upstream)
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
    """The providers of a configuration, and the current `table`."""

    def __init__(self, providers: Iterable[Provider]) -> None:
        self._providers = tuple(providers)
        self._upstreams: dict[str, tuple[Upstream, ...]] = {}
        for provider in self._providers:
            runtime = RUNTIMES[provider.runtime or "openai"]
            several = len(provider.base_urls) > 1
            self._upstreams[provider.name] = tuple(
                Upstream(
                    f"{provider.name}@{urlsplit(url).netloc}" if several else provider.name,
                    provider.name,
                    runtime,
                    url,
                    api_key=provider.api_key.value,
                    timeouts=provider.timeouts,
                    weight=provider.weight,
                    max_in_flight=provider.max_in_flight,
                )
                for url in provider.base_urls
            )
        self.table = self._build()

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        return tuple(upstream for upstreams in self._upstreams.values() for upstream in upstreams)

    def rebuild(self) -> None:
        """Compile a new table from what is known now, and swap it in."""
        self.table = self._build()

    def _build(self) -> Table:
        listed = []
        discovered: dict[Upstream, frozenset[str]] = {}
        for provider in self._providers:
            upstreams = self._upstreams[provider.name]
            runtime = upstreams[0].runtime
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
        return Table(listed, discovered)


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
