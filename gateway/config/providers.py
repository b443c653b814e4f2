"""Providers: the array in `OPENAI_COMPATIBLE_DATA` or `[[providers]]` in TOML; and `OLLAMA_BASE_URL`.

    [{"provider": "LocalVLLM", "baseUrl": "http://localhost:8000/v1", "apiKey": "",
      "models": [{"apiName": "deepseek-r1-distill-qwen-7b", "uiName": "R1 7B", "supportsTools": false,
                  "aliases": ["r1"], "contextWindow": 32768, "price": {"input": 0.1, "output": 0.4}}],
      "baseUrls": ["http://gpu1:8000/v1", "http://gpu2:8000/v1"], "runtime": "vllm", "weight": 1,
      "timeouts": {"connect": 5, "firstByte": 600, "idle": 60, "total": null}}]

`provider` and one of `baseUrl`, `baseUrls` are required; `models` left out means "ask the upstream". Times
are in seconds; null or "off" switches one off. `apiKey` may be "env:NAME", which reads another variable. Keys
may be written in snake_case too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from gateway.config import parsing
from gateway.config.model import Model, Price, Provider, Secret
from gateway.config.parsing import Collector, Refused
from gateway.runtimes import RUNTIMES
from gateway.upstreams.upstream import Timeouts

T = TypeVar("T")

_PROVIDER_KEYS: Final = (
    "provider",
    "baseUrl",
    "baseUrls",
    "apiKey",
    "models",
    "runtime",
    "weight",
    "timeouts",
)
_MODEL_KEYS: Final = ("apiName", "uiName", "supportsTools", "aliases", "contextWindow", "price")
_PRICE_KEYS: Final = ("input", "cachedInput", "output", "gpuSecond")
_TIMEOUT_KEYS: Final = ("connect", "firstByte", "idle", "total")
#: what other programs call the same thing
_MEANT: Final = {
    "name": ("provider", "apiName"),
    "id": ("apiName",),
    "model": ("apiName", "models"),
    "url": ("baseUrl",),
    "api_base": ("baseUrl",),
    "key": ("apiKey",),
    "tools": ("supportsTools",),
}


class Reader:
    """Reads providers, collecting every problem and, by configuration path, the origin of every value."""

    def __init__(self, collect: Collector, variables: Mapping[str, str]) -> None:
        self.collect = collect
        self.variables = variables
        self.source = ""
        self.origins: dict[str, str] = {}

    def providers(self, raw: object, path: str, source: str, origin: str) -> tuple[Provider, ...]:
        """All usable providers in `raw`; `path`, `source` and `origin` say where it stood."""
        self.source = source
        if not isinstance(raw, list):
            hint = "an array even for one provider: [{…}]" if isinstance(raw, dict) else ""
            self.collect.refuse(path, self.source, Refused("must be an array of providers", hint=hint), raw)
            return ()
        found: list[Provider] = []
        first_at: dict[str, str] = {}
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
        urls = self._base_urls(entry, runtime)
        timeouts = self._timeouts(entry)
        discover = entry.raw.get("models") is None
        models = self._models(entry)
        if not name:
            return None
        return Provider(name, urls, runtime, key, models, discover, weight, timeouts, entry.origin)

    def _base_urls(self, entry: Entry, runtime: str) -> tuple[str, ...]:
        def parse(raw: object) -> str:
            url = parsing.base_url(raw)
            return url.removesuffix("/api") + "/v1" if runtime == "ollama" and url.endswith("/api") else url

        single = entry.take("baseUrl", parse, "")
        urls = [single] if single else []
        places = {single: "baseUrl"} if single else {}
        for item in entry.items("baseUrls", parse):
            if item.value in places:
                entry.add(item.key, f"the same address as {places[item.value]}")
            else:
                places[item.value] = item.key
                urls.append(item.value)
        given = [key for key in ("baseUrl", "baseUrls") if entry.raw.get(key) is not None]
        if not entry.broken and (not given or (given == ["baseUrls"] and entry.raw["baseUrls"] == [])):
            entry.add("baseUrl", "is missing", hint='such as "http://localhost:8000/v1"')
        return tuple(urls)

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
        )

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


class Item:
    """One element of a list in an entry: its value, and its key ("aliases[2]")."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: Any) -> None:
        self.key = key
        self.value = value


class Entry:
    """One object of the configuration. Reports what it cannot read, and keys nobody knows, as it is taken apart.

    `path` names it in problems, `origin` in words for its values, `config_path` in `Config.origins`.
    """

    __slots__ = ("broken", "config_path", "known", "origin", "path", "raw", "reader", "spelled")

    def __init__(
        self, reader: Reader, raw: object, path: str, origin: str, config_path: str, known: tuple[str, ...]
    ) -> None:
        self.reader = reader
        self.path = path
        self.origin = origin
        self.config_path = config_path
        self.known = known
        self.raw: dict[str, Any] = {}
        self.spelled: dict[str, str] = {}
        self.broken = not isinstance(raw, dict)
        reader.origins[config_path] = origin
        if isinstance(raw, dict):
            self._keys(raw)
        else:
            reader.collect.refuse(path, reader.source, Refused("must be an object"), raw)

    def _keys(self, raw: dict[str, Any]) -> None:
        names = {key: key for key in self.known} | {snake(key): key for key in self.known}
        for written, value in raw.items():
            key = names.get(written)
            shown = written if written.isprintable() and len(written) <= 60 else "…"
            if key is None:
                meant = next((m for m in _MEANT.get(snake(written), ()) if m in self.known), "")
                near = meant or parsing.nearest(written, self.known)
                self.reader.collect.add(
                    f"{self.path}.{shown}",
                    self.reader.source,
                    "unknown key",
                    nearest=near,
                    hint="" if near else _list(self.known),
                )
            elif key in self.raw:
                self.add(written, f"given twice, also as {self.spelled[key]}")
            else:
                self.raw[key] = value
                self.spelled[key] = written

    def at(self, key: str) -> str:
        head, bracket, rest = key.partition("[")
        return f"{self.path}.{self.spelled.get(head, head)}{bracket}{rest}"

    def where(self, key: str) -> str:
        return f"{self.origin}.{self.spelled.get(key, key)}"

    def add(self, key: str, message: str, *, hint: str = "") -> None:
        self.reader.collect.add(self.at(key), self.reader.source, message, hint=hint)

    def take(
        self,
        key: str,
        parse: Callable[[object], T],
        default: T,
        *,
        required: bool = False,
        null: bool = False,
    ) -> T:
        """The value of `key`, or `default` if it is left out, null (unless `null` is a value) or unusable."""
        raw = self.raw.get(key)
        if key not in self.raw or (raw is None and not null):
            if required and not self.broken:
                self.add(key, "is missing")
            self.reader.origins[f"{self.config_path}.{snake(key)}"] = "default"
            return default
        try:
            return parse(raw)
        except Refused as refused:
            self.reader.collect.refuse(self.at(key), self.reader.source, refused, raw)
            return default

    def items(self, key: str, parse: Callable[[object], T]) -> list[Item]:
        """The usable elements of the list at `key`; an empty list if it is left out."""
        raw = self.raw.get(key)
        if raw is None:
            return []
        if not isinstance(raw, list):
            self.reader.collect.refuse(self.at(key), self.reader.source, Refused("must be an array"), raw)
            return []
        found = []
        for index, element in enumerate(raw):
            try:
                found.append(Item(f"{key}[{index}]", parse(element)))
            except Refused as refused:
                self.reader.collect.refuse(self.at(f"{key}[{index}]"), self.reader.source, refused, element)
        return found

    def enter(self, key: str, known: tuple[str, ...]) -> Entry | None:
        """The object at `key`, or None if it is left out."""
        if self.raw.get(key) is None:
            self.reader.origins[f"{self.config_path}.{snake(key)}"] = "default"
            return None
        config_path = f"{self.config_path}.{snake(key)}"
        return Entry(self.reader, self.raw[key], self.at(key), self.where(key), config_path, known)


def snake(key: str) -> str:
    """ "baseUrl" -> "base_url"."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()


def native_root(url: str) -> str:
    """Ollama's own root: "http://h:11434/api/" and "http://h:11434/v1" -> "http://h:11434"."""
    url = url.rstrip("/")
    return url.removesuffix("/api").removesuffix("/v1").rstrip("/")


def _runtime(raw: object) -> str:
    if isinstance(raw, str) and raw in RUNTIMES:
        return raw
    if raw == "":
        return ""
    near = parsing.nearest(raw.replace(".", "").replace(" ", ""), RUNTIMES) if isinstance(raw, str) else ""
    raise Refused("unknown runtime", nearest=near, hint=_list(RUNTIMES))


def _list(names: Any) -> str:
    return "valid: " + ", ".join(names)
