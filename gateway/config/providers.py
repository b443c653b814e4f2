"""Providers: the array in `OPENAI_COMPATIBLE_DATA` or `[[providers]]` in TOML; and `OLLAMA_BASE_URL`.

    [{"provider": "LocalVLLM", "baseUrl": "http://localhost:8000/v1", "apiKey": "",
      "models": [{"apiName": "deepseek-r1-distill-qwen-7b", "uiName": "R1 7B", "supportsTools": false,
                  "aliases": ["r1"], "contextWindow": 32768, "price": {"input": 0.1, "output": 0.4},
                  "fallbacks": ["qwen3-32b"], "continue": "auto"}],
      "baseUrls": ["http://gpu1:8000/v1", "dns+http://workers.internal:8000/v1", "srv+http://_llm._tcp.internal/v1"],
      "baseUrlsFile": "/run/hosts.json", "runtime": "vllm", "weight": 1,
      "maxInFlight": 32,
      "timeouts": {"connect": 5, "firstByte": 600, "idle": 60, "total": null}}]

`provider` and one of `baseUrl`, `baseUrls`, `baseUrlsFile` are required; `models` left out means "ask the upstream".
"dns+" before an address means every host that its name resolves to, "srv+" those that the name's SRV records list; the
file holds a JSON array of addresses, or `baseUrls` in TOML. Times are in seconds; null or "off" switches one off.
`apiKey` may be "env:NAME", which reads another variable. Keys may be written in snake_case too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from gateway.config import parsing
from gateway.config.entries import Entry, Report
from gateway.config.files import Files
from gateway.config.model import Lookup, Model, Price, Provider, Secret
from gateway.config.parsing import Collector, Refused
from gateway.routing.policies import POLICIES
from gateway.runtimes import RUNTIMES
from gateway.upstreams.upstream import Timeouts

_PROVIDER_KEYS: Final = (
    "provider",
    "baseUrl",
    "baseUrls",
    "baseUrlsFile",
    "apiKey",
    "models",
    "runtime",
    "weight",
    "maxInFlight",
    "cacheTokens",
    "timeouts",
)
_MODEL_KEYS: Final = (
    "apiName",
    "uiName",
    "supportsTools",
    "aliases",
    "contextWindow",
    "price",
    "fallbacks",
    "continue",
    "policy",
)
_PRICE_KEYS: Final = ("input", "cachedInput", "output", "gpuSecond")
_TIMEOUT_KEYS: Final = ("connect", "firstByte", "idle", "total")


class Reader(Report):
    """Reads providers, collecting every problem and, by configuration path, the origin of every value."""

    def __init__(self, collect: Collector, variables: Mapping[str, str], files: Files) -> None:
        super().__init__(collect)
        self.variables = variables
        self.files = files
        self._first_at: dict[str, str] = {}  # provider -> where it stands
        #: each name that stands among fallbacks, where it stands, and the source of that
        self.fallbacks: list[tuple[str, str, str]] = []

    def providers(
        self, raw: object, path: str, source: str, origin: str, before: tuple[Provider, ...] = ()
    ) -> tuple[Provider, ...]:
        """`before` and all usable providers in `raw`; `path`, `source` and `origin` say where it stood."""
        self.source = source
        if not isinstance(raw, list):
            hint = "an array even for one provider: [{…}]" if isinstance(raw, dict) else ""
            self.collect.refuse(path, self.source, Refused("must be an array of providers", hint=hint), raw)
            return before
        found = list(before)
        first_at = self._first_at
        for index, item in enumerate(raw):
            entry = Entry(
                self,
                item,
                f"{path}[{index}]",
                f"{origin}[{index}]",
                f"providers[{len(found)}]",
                _PROVIDER_KEYS,
            )
            provider = self._provider(entry)
            if provider is None:
                continue
            if provider.name in first_at:
                entry.add("provider", f"{provider.name!r} is already the name of {first_at[provider.name]}")
                continue
            first_at[provider.name] = entry.path
            found.append(provider)
        self._shared_addresses(found, path)
        return tuple(found)

    def ollama(
        self, root: str, providers: tuple[Provider, ...], path: str, source: str, origin: str
    ) -> tuple[Provider, ...]:
        """`providers` with the Ollama at `root` among them: the one declared at that address, or a new one."""
        for index, provider in enumerate(providers):
            if root in map(native_root, provider.base_urls):
                if provider.runtime == "":
                    provider = replace(provider, runtime="ollama")
                    self.origins[f"providers[{index}].runtime"] = origin
                return (*providers[:index], provider, *providers[index + 1 :])
        if any(provider.name == "ollama" for provider in providers):
            message = "becomes the provider 'ollama', but another provider at another address has that name"
            self.collect.add(path, source, message, hint="rename that provider, or remove this setting")
            return providers
        added = f"providers[{len(providers)}]"
        self.origins[added] = origin
        self.origins |= dict.fromkeys((f"{added}.api_key", f"{added}.weight", f"{added}.timeouts"), "default")
        return (
            *providers,
            Provider("ollama", (root + "/v1",), runtime="ollama", discover=True, origin=origin),
        )

    def check_fallbacks(self, providers: tuple[Provider, ...]) -> None:
        """Whether each fallback names a model of `providers`; to be asked when all of them are known."""
        models = [model for provider in providers for model in provider.models]
        known = dict.fromkeys(name for model in models for name in (model.name, *model.aliases))
        # What a provider will name when it is asked nobody knows yet.
        told = not any(provider.discover for provider in providers)
        for name, path, source in self.fallbacks:
            if name in known:
                continue
            near = parsing.nearest(name, known)
            if told:
                hint = "" if near else "the name or an alias of a model"
                self.collect.add(path, source, f"there is no model {parsing.show(name)}", nearest=near, hint=hint)
            else:
                message = f"no model {parsing.show(name)} is configured"
                self.collect.warn(path, source, message, nearest=near, hint="one that asks its server may have it")
        self._cycles(models)

    def _cycles(self, models: list[Model]) -> None:
        """A model that falls back on itself is a mistake; by way of another it is a warning, for each is asked once."""
        chains: dict[str, list[str]] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                chains.setdefault(name, []).extend(model.fallbacks)
        places = {name: (path, source) for name, path, source in reversed(self.fallbacks)}
        found: set[frozenset[str]] = set()
        for model in models:
            if set(model.fallbacks) & {model.name, *model.aliases}:
                path, source = places[next(iter(set(model.fallbacks) & {model.name, *model.aliases}))]
                self.collect.add(path, source, f"{model.name!r} falls back on itself")
                continue
            way = _way_back(model.name, chains)
            if way and frozenset(way) not in found:
                found.add(frozenset(way))
                path, source = places[way[1]]
                self.collect.warn(path, source, f"{' -> '.join(way)} is a circle", hint="each is asked once")

    def secret(self, raw: object) -> Secret:
        """A credential, or the one in the variable that "env:NAME" names. Its text appears in no message."""
        text = parsing.header_text(raw)
        if not text.startswith("env:"):
            return Secret(text)
        name = text.removeprefix("env:")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,100}", name):
            raise Refused('"env:" is not followed by the name of a variable', shown="")
        value = self.variables.get(name, "")
        if not value:
            near = parsing.nearest(name, self.variables)
            raise Refused(f"the variable {name} is not set", nearest=f"env:{near}" if near else "", shown="")
        return Secret(parsing.header_text(value))

    def _provider(self, entry: Entry) -> Provider | None:
        name = entry.take("provider", parsing.name, "", required=True)
        runtime = entry.take("runtime", _runtime, "")
        key = entry.take("apiKey", self.secret, Secret(""))
        weight = entry.take("weight", parsing.whole(1, 1_000_000), 1)
        most = entry.take("maxInFlight", parsing.whole(1, 1_000_000), None)
        cache = entry.take("cacheTokens", parsing.whole(1, 2**40), None)
        urls, lookups = self._addresses(entry, runtime)
        timeouts = self._timeouts(entry)
        discover = entry.raw.get("models") is None
        models = self._models(entry)
        if not name:
            return None
        return Provider(
            name, urls, runtime, key, models, discover, weight, timeouts, entry.origin, most, cache, lookups
        )

    def _addresses(self, entry: Entry, runtime: str) -> tuple[tuple[str, ...], tuple[Lookup, ...]]:
        def parse(raw: object) -> str | Lookup:
            found = parsing.base_address(raw)
            if isinstance(found, str) and runtime == "ollama" and found.endswith("/api"):
                return found.removesuffix("/api") + "/v1"
            return found

        single: str | Lookup | None = entry.take("baseUrl", parse, None)
        places: dict[str | Lookup, str] = {} if single is None else {single: "baseUrl"}
        for item in entry.items("baseUrls", parse):
            if item.value in places:
                entry.add(item.key, f"the same address as {places[item.value]}")
            else:
                places[item.value] = item.key
        keys = ("baseUrl", "baseUrls", "baseUrlsFile")
        given = [key for key in keys if entry.raw.get(key) is not None]
        if not entry.broken and (not given or (given == ["baseUrls"] and entry.raw["baseUrls"] == [])):
            entry.add("baseUrl", "is missing", hint='such as "http://localhost:8000/v1"')
        file: Path | None = entry.take("baseUrlsFile", parsing.file, None)
        if file is not None:
            self._listed(file, parse, places)
        urls = tuple(one for one in places if isinstance(one, str))
        return urls, tuple(one for one in places if isinstance(one, Lookup))

    def _listed(self, file: Path, parse: Callable[[object], str | Lookup], places: dict[str | Lookup, str]) -> None:
        """Add the addresses in `file` to `places`. Twice the same is no mistake there: a program wrote it."""
        for index, raw in enumerate(self.files.array(file, "baseUrls") or ()):
            try:
                places.setdefault(parse(raw), f"{file}[{index}]")
            except Refused as refused:
                self.collect.refuse(f"{file}[{index}]", str(file), refused, raw)

    def _timeouts(self, entry: Entry) -> Timeouts:
        inner = entry.enter("timeouts", _TIMEOUT_KEYS)
        if inner is None:
            return Timeouts()
        default = Timeouts()
        positive = parsing.number(above=0.0, unit=" (seconds)")

        def or_off(raw: object) -> float | None:
            return None if raw is None or raw == "off" else positive(raw)

        return Timeouts(
            inner.take("connect", positive, default.connect_s),
            inner.take("firstByte", or_off, default.first_byte_s, null=True),
            inner.take("idle", or_off, default.idle_s, null=True),
            inner.take("total", or_off, default.total_s, null=True),
        )

    def _models(self, entry: Entry) -> tuple[Model, ...]:
        raw = entry.raw.get("models")
        if raw is None:
            return ()
        path, origin = entry.at("models"), entry.where("models")
        if not isinstance(raw, list):
            self.collect.refuse(
                path, self.source, Refused("must be an array of models", hint='[{"apiName": "…"}]'), raw
            )
            return ()
        if not raw:
            message = "is empty, so this provider serves nothing"
            self.collect.warn(
                path, self.source, message, hint="list its models, or leave the key out to ask the provider"
            )
            return ()
        names: dict[str, str] = {}
        inner = [
            Entry(self, item, f"{path}[{i}]", f"{origin}[{i}]", f"{entry.config_path}.models[{i}]", _MODEL_KEYS)
            for i, item in enumerate(raw)
        ]
        for model_entry in inner:
            api_name = model_entry.take("apiName", parsing.name, "", required=True)
            if api_name in names:
                model_entry.add("apiName", f"{api_name!r} is already the model at {names[api_name]}")
            elif api_name:
                names[api_name] = model_entry.path
        models = [self._model(model_entry, names) for model_entry in inner]
        return tuple(model for model in models if model.name)

    def _model(self, entry: Entry, names: dict[str, str]) -> Model:
        name = entry.raw.get("apiName")
        name = name if isinstance(name, str) and name in names else ""
        aliases: list[str] = []
        for item in entry.items("aliases", parsing.name):
            if item.value in names:
                entry.add(item.key, f"{item.value!r} is already the name or an alias of {names[item.value]}")
            else:
                names[item.value] = entry.at(item.key)
                aliases.append(item.value)
        return Model(
            name,
            entry.take("uiName", parsing.name, name),
            entry.take("supportsTools", parsing.boolean, True),
            tuple(aliases),
            entry.take("contextWindow", parsing.whole(1, 2**40), None),
            self._price(entry),
            self._fallbacks(entry),
            entry.take("continue", _on_off_auto, None),
            entry.take("policy", parsing.choice(*POLICIES), ""),
        )

    def _fallbacks(self, entry: Entry) -> tuple[str, ...]:
        names: dict[str, str] = {}
        for item in entry.items("fallbacks", parsing.name):
            if item.value in names:
                entry.add(item.key, f"the same as {names[item.value]}")
            names.setdefault(item.value, item.key)
            self.fallbacks.append((item.value, entry.at(item.key), self.source))
        return tuple(names)

    def _price(self, entry: Entry) -> Price | None:
        inner = entry.enter("price", _PRICE_KEYS)
        if inner is None:
            return None
        amount = parsing.number(most=1e9)
        return Price(*(inner.take(key, amount, None) for key in _PRICE_KEYS))

    def _shared_addresses(self, providers: list[Provider], path: str) -> None:
        seen: dict[str, str] = {}
        for provider in providers:
            for url in provider.base_urls:
                if url in seen:
                    message = f"{seen[url]!r} and {provider.name!r} share the address {url}"
                    self.collect.warn(path, self.source, message, hint="its load is counted apart for each of them")
                seen.setdefault(url, provider.name)


def _way_back(name: str, chains: Mapping[str, list[str]]) -> list[str]:
    """The shortest chain of fallbacks from `name` to itself; empty if there is none."""
    ways = [[name]]
    seen: set[str] = set()
    for way in ways:
        for other in chains.get(way[-1], ()):
            if other == name:
                return [*way, name]
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []


def native_root(url: str) -> str:
    """Ollama's own root: "http://h:11434/api/" and "http://h:11434/v1" -> "http://h:11434"."""
    url = url.rstrip("/")
    return url.removesuffix("/api").removesuffix("/v1").rstrip("/")


def _on_off_auto(raw: object) -> bool | None:
    if raw == "auto":
        return None
    if isinstance(raw, bool):
        return raw
    raise Refused('must be true, false or "auto"')


def _runtime(raw: object) -> str:
    if isinstance(raw, str) and raw in RUNTIMES:
        return raw
    if raw == "":
        return ""
    near = parsing.nearest(raw.replace(".", "").replace(" ", ""), RUNTIMES) if isinstance(raw, str) else ""
    raise Refused("unknown runtime", nearest=near, hint="valid: " + ", ".join(RUNTIMES))
