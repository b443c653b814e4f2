"""LiteLLM's proxy configuration: https://docs.litellm.ai/docs/proxy/configs

    model_list:
      - model_name: qwen3                       the name clients use: an alias here
        litellm_params:
          model: hosted_vllm/Qwen/Qwen3-32B     which runtime, and its own name for the model
          api_base: http://gpu1:8000/v1
          api_key: os.environ/VLLM_KEY
          weight: 2

Deployments with one address, key, weight and times become one provider. Those of one `model_name` are one pool, as they
are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from gateway.importers.document import Notes, Section

#: LiteLLM's name of a provider -> our runtime ("" is any OpenAI-compatible server), and the address it has by default
RUNTIMES: Final[dict[str, tuple[str, str]]] = {
    "openai": ("", "https://api.openai.com/v1"),
    "text-completion-openai": ("", "https://api.openai.com/v1"),
    "custom_openai": ("", ""),
    "openai_like": ("", ""),
    "hosted_vllm": ("vllm", ""),
    "vllm": ("vllm", ""),
    "ollama": ("ollama", "http://localhost:11434"),
    "ollama_chat": ("ollama", "http://localhost:11434"),
    "lm_studio": ("lmstudio", "http://localhost:1234/v1"),
    "llamafile": ("llamacpp", "http://localhost:8080/v1"),
    "litellm_proxy": ("litellm", ""),
}

_RATE: Final = "there is no limit of rates for a host: `max_in_flight` limits requests at once, `limits` those of keys"
_OWN: Final = "is decided by health checks and breakers here, without settings"
_REASONS: Final[dict[str, str]] = {
    "routing_strategy": "the policy here is another: see `policy`",
    "allowed_fails": _OWN,
    "cooldown_time": _OWN,
    "enable_pre_call_checks": _OWN,
    "redis_host": "set REDIS_URL",
    "redis_port": "set REDIS_URL",
    "redis_password": "set REDIS_URL",
    "redis_url": "set REDIS_URL",
    "database_url": "keys and usage are kept in the data directory and the store",
    "callbacks": "nothing is called from here; there are Prometheus metrics and one log line for each request",
    "success_callback": "nothing is called from here; there are Prometheus metrics and one log line for each request",
    "failure_callback": "nothing is called from here; there are Prometheus metrics and one log line for each request",
    "cache": "answers are not cached",
    "drop_params": "requests are passed on as they are",
    "context_window_fallbacks": "a fallback is asked when no host can answer, not when a prompt is too long",
    "content_policy_fallbacks": "a fallback is asked when no host can answer, not for what an answer says",
    "environment_variables": "set them for the process, or in .env",
    "include": "import those files one by one",
}
#: of a deployment: what a client would have to send
_PER_REQUEST: Final = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "extra_body")


class Place(NamedTuple):
    """What deployments share to be one provider."""

    runtime: str
    base_url: str
    api_key: str
    weight: int
    max_in_flight: int | None
    first_byte_s: float | None
    idle_s: float | None


class Result(NamedTuple):
    """`document` has the keys of our TOML file."""

    document: dict[str, Any]
    notes: Notes


class Importer:
    """One configuration; `environ` gives the addresses that stand in variables."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.notes = Notes()
        self._environ = environ
        #: place -> models there, by the runtime's own names
        self._places: dict[Place, dict[str, dict[str, Any]]] = {}
        #: public name -> its models, and whether it has any at a place that could not be taken over
        self._groups: dict[str, list[dict[str, Any]]] = {}

    def run(self, raw: object) -> Result:
        root = Section(raw, "", self.notes)
        router = root.section("router_settings")
        settings = root.section("litellm_settings")
        general = root.section("general_settings")
        first_byte_s = router.number("timeout") or settings.number("request_timeout")
        for path, entry in root.items("model_list"):
            self._deployment(Section(entry, path, self.notes), first_byte_s)
        self._aliases(router.section("model_group_alias"))
        for section in (router, settings):
            self._fallbacks(section)
        document: dict[str, Any] = {}
        retries = router.number("num_retries") or settings.number("num_retries")
        if retries is not None:
            document["attempts"] = min(int(retries) + 1, 10)
        self._master_key(general, document)
        for section in (router, settings, general, root):
            section.left_out(_REASONS)
        document["providers"] = self._providers()
        return Result(document, self.notes)

    # -- deployments ------------------------------------------------------------------------------------------------

    def _deployment(self, entry: Section, first_byte_s: float | None) -> None:
        group = entry.text("model_name")
        params = entry.section("litellm_params")
        info = entry.section("model_info")
        place, name = self._place(params, first_byte_s)
        model = self._model(params, info)
        info.ignore("id", "mode", "db_model")
        for section in (entry, params, info):
            section.left_out(_REASONS | dict.fromkeys(_PER_REQUEST, "is for the client to send"))
        if place is None:
            return
        if not group or not name:
            self.notes.add(entry.path, "has no model_name or no model, and is left out")
            return
        if "*" in group or "*" in name:
            self._places.setdefault(place, {})["*"] = {}
            self.notes.add(entry.path, f"a wildcard: {place.base_url} is asked for its models, under their own names")
            return
        self._add(place, name, group, model)

    def _place(self, params: Section, first_byte_s: float | None) -> tuple[Place | None, str]:
        model = params.text("model")
        prefix, slash, rest = model.partition("/")
        kind = params.text("custom_llm_provider") or (prefix if slash else "openai")
        name = rest if slash and prefix == kind else model
        base_url = self._value(params, "api_base") or self._value(params, "base_url")
        key = params.text("api_key")
        weight = self._weight(params)
        most = params.number("max_parallel_requests")
        timeout_s = params.number("timeout") or first_byte_s
        idle_s = params.number("stream_timeout")
        if kind not in RUNTIMES:
            self.notes.add(
                f"{params.path}.model", f"{model!r} is left out: {kind!r} does not speak OpenAI's API as it is"
            )
            return None, name
        runtime, default = RUNTIMES[kind]
        base_url = (base_url or default).rstrip("/")
        if not base_url:
            self.notes.add(f"{params.path}.api_base", "is missing: the deployment is left out")
            return None, name
        if runtime == "ollama":
            base_url = base_url.removesuffix("/v1").removesuffix("/api") + "/v1"
        if key.startswith("os.environ/"):
            key = "env:" + key.removeprefix("os.environ/")
        elif not key and base_url == "https://api.openai.com/v1":
            key = "env:OPENAI_API_KEY"
        whole = None if most is None else max(1, int(most))
        return Place(runtime, base_url, key, weight, whole, timeout_s, idle_s), name

    def _weight(self, params: Section) -> int:
        """LiteLLM weighs deployments by `weight`, else by `rpm`, else by `tpm`."""
        weight = params.number("weight")
        for key in ("rpm", "tpm"):
            rate = params.number(key)
            if rate is not None:
                self.notes.add(f"{params.path}.{key}", _RATE + ("" if weight else "; it is taken as the weight"))
                weight = weight or rate
        return min(max(1, round(weight)), 1_000_000) if weight is not None else 1

    def _model(self, params: Section, info: Section) -> dict[str, Any]:
        model: dict[str, Any] = {}
        price = {}
        for ours, theirs in (
            ("input", "input_cost_per_token"),
            ("cached_input", "cache_read_input_token_cost"),
            ("output", "output_cost_per_token"),
        ):
            amount = info.number(theirs, zero=True)
            own = params.number(theirs, zero=True)
            amount = own if own is not None else amount
            if amount is not None:
                price[ours] = float(f"{amount * 1e6:.10g}")
        if price:
            model["price"] = price
        window = info.number("max_input_tokens")
        if window is not None:
            model["context_window"] = int(window)
        if info.take("supports_function_calling") is False:
            model["supports_tools"] = False
        return model

    def _value(self, section: Section, key: str) -> str:
        """A text; one that stands in a variable is read now, for only keys may be named by a variable here."""
        text = section.text(key)
        if not text.startswith("os.environ/"):
            return text
        name = text.removeprefix("os.environ/")
        value = self._environ.get(name, "")
        said = f"the value that {name} has now is taken" if value else f"the variable {name} is not set"
        self.notes.add(f"{section.path}.{key}", said)
        return value

    def _add(self, place: Place, name: str, group: str, model: dict[str, Any]) -> None:
        """Have `name` at `place`, for clients that ask for `group`."""
        models = self._places.setdefault(place, {})
        known = models.get(name)
        if known is None:
            known = models[name] = {"api_name": name, **model}
        if group != name and group not in known.setdefault("aliases", []):
            known["aliases"].append(group)
        if known not in self._groups.setdefault(group, []):
            self._groups[group].append(known)

    # -- what stands between models ---------------------------------------------------------------------------------

    def _aliases(self, section: Section) -> None:
        for alias in section.left():
            target = section.take(alias)
            name = target.get("model") if isinstance(target, dict) else target
            if not isinstance(name, str) or name not in self._groups:
                self.notes.add(f"{section.path}.{alias}", f"{name!r} is no model that was taken over")
                continue
            if isinstance(target, dict) and target.get("hidden"):
                self.notes.add(f"{section.path}.{alias}.hidden", "aliases are listed")
            for model in self._groups[name]:
                model.setdefault("aliases", []).append(alias)
            self._groups[alias] = self._groups[name]

    def _fallbacks(self, section: Section) -> None:
        for path, entry in section.items("fallbacks"):
            pairs = entry.items() if isinstance(entry, dict) else ()
            if not pairs:
                self.notes.add(path, "is no mapping of a model to others, and is left out")
            for group, others in pairs:
                self._fall_back(f"{path}.{group}", str(group), others)
        for path, other in section.items("default_fallbacks"):
            for group in list(self._groups):
                if group != other:
                    self._fall_back(path, group, [other])

    def _fall_back(self, path: str, group: str, others: object) -> None:
        if group not in self._groups:
            self.notes.add(path, f"{group!r} is no model that was taken over")
            return
        for other in others if isinstance(others, list) else ():
            if not isinstance(other, str) or other not in self._groups:
                self.notes.add(path, f"{other!r} is no model that was taken over")
                continue
            for model in self._groups[group]:
                own = (model["api_name"], *model.get("aliases", ()))
                if other not in own and other not in model.setdefault("fallbacks", []):
                    model["fallbacks"].append(other)

    def _master_key(self, general: Section, document: dict[str, Any]) -> None:
        key = general.text("master_key")
        if key.startswith("os.environ/"):
            document["api_keys"] = {"master": "env:" + key.removeprefix("os.environ/")}
        elif len(key) >= 16:
            document["api_keys"] = {"master": key}
        elif key:
            self.notes.add(f"{general.path}.master_key", "is too short: 16 characters or more are wanted")
        if "api_keys" in document:
            self.notes.add(
                f"{general.path}.master_key", "may ask for models like any key; `llm-gateway keys` makes admins"
            )

    # -- the result -------------------------------------------------------------------------------------------------

    def _providers(self) -> list[dict[str, Any]]:
        providers: list[dict[str, Any]] = []
        taken: set[str] = set()
        groups = set(self._groups)
        common = gcd(*(place.weight for place in self._places)) or 1
        for place, models in self._places.items():
            lists: list[list[dict[str, Any]] | None] = [
                *_without_clashes([model for name, model in models.items() if name != "*"])
            ]
            if "*" in models:
                lists.append(None)
            providers += [_provider(place, some, taken, place.weight // common) for some in lists]
            for name, model in models.items():
                if name in groups and model not in self._groups[name]:
                    self.notes.add(
                        f"model_list: {name}",
                        f"is the name of other models, too: those who ask for {name!r} may get this one "
                        f"of {place.base_url}",
                    )
        return providers


def _without_clashes(models: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The models in as few lists as keep each name to one model of a list, as a provider must."""
    lists: list[tuple[set[str], list[dict[str, Any]]]] = []
    for model in models:
        names = {model["api_name"], *model.get("aliases", ())}
        for taken, some in lists:
            if not taken & names:
                taken |= names
                some.append(model)
                break
        else:
            lists.append((names, [model]))
    return [some for _, some in lists]


def _provider(place: Place, models: list[dict[str, Any]] | None, taken: set[str], weight: int) -> dict[str, Any]:
    url = urlsplit(place.base_url)
    base = f"{place.runtime or 'openai'}-{url.netloc.rpartition('@')[2].replace(':', '-').strip('[]')}"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}-{count}"
    taken.add(name)
    provider: dict[str, Any] = {"provider": name, "base_url": place.base_url}
    if place.runtime:
        provider["runtime"] = place.runtime
    if place.api_key:
        provider["api_key"] = place.api_key
    if weight != 1:
        provider["weight"] = weight
    if place.max_in_flight is not None:
        provider["max_in_flight"] = place.max_in_flight
    times = {"first_byte": place.first_byte_s, "idle": place.idle_s}
    if any(times.values()):
        provider["timeouts"] = {key: value for key, value in times.items() if value is not None}
    if models is not None:
        provider["models"] = models
    return provider
