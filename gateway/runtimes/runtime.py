"""Runtime: one kind of inference server, described as data; and what the OpenAI-compatible ones share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeGuard

import orjson

#: More names than this in one list are cut: a model list is shown to people and used as metric labels.
MODELS_MAX: Final = 4096

#: The operations that every runtime is asked for, and nothing else (default deny).
OPENAI_PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "chat": "/v1/chat/completions",
        "completions": "/v1/completions",
        "embeddings": "/v1/embeddings",
    }
)
#: those that some have: each runtime's file says which
RESPONSES: Final = {"responses": "/v1/responses"}
MESSAGES: Final = {"messages": "/v1/messages"}
COUNT_TOKENS: Final = {"count_tokens": "/v1/messages/count_tokens"}
RERANK: Final = {"rerank": "/v1/rerank"}


@dataclass(frozen=True, slots=True)
class Details:
    """What a runtime says of itself besides its models; None where it does not say."""

    slots: int | None = None  # requests it runs at once
    loaded: frozenset[str] | None = None  # models that are in memory now


@dataclass(frozen=True, slots=True)
class Runtime:
    """One kind of inference server.

    Paths are written relative to an upstream's root, which is what stands before "/v1" in its base URL. The
    health and model-list doors are free: a GET there runs no model and loads none.
    """

    name: str
    title: str
    default_port: int | None
    health_path: str
    models_path: str
    #: names in the body of `models_path`; raises ValueError with the reason if the body is no model list
    parse_models: Callable[[bytes], tuple[str, ...]]
    #: operation -> path: what the data plane may ask of this runtime
    paths: Mapping[str, str]
    #: `stream_options.include_usage` is added to a streamed request that does not ask for it
    inject_usage: bool
    #: the runtime closes a kept-alive connection that was idle for this long; ours must be closed earlier
    idle_s: float
    #: tokens a model can take, by name, where the body of `models_path` tells
    parse_windows: Callable[[bytes], Mapping[str, int]] = lambda body: {}
    #: a further free door, "" if there is none, and what its body tells; raises ValueError if it tells nothing
    details_path: str = ""
    parse_details: Callable[[bytes], Details] = lambda body: Details()
    #: whether a streamed chat goes on with a final assistant message: "asked" by vLLM's flags, "always", or never
    continues: Literal["", "asked", "always"] = ""
    #: tokens of a completion for which no length was asked; None: as many as there is room for
    completion_tokens: int | None = None
    #: a further free door, "" if there is none, whose body tells the tokens that the prefix cache holds, or 0
    cache_path: str = ""
    parse_cache: Callable[[bytes], int] = lambda body: 0
    #: requests take `cache_salt`, which keeps tenants apart in the prefix cache
    cache_salt: bool = False
    #: operation -> path of model management; apart from `paths`, so that no prompt route can ever name one
    manage: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def locate(self, prefix: str, path: str) -> str:
        """Absolute URL path of `path` behind a base URL whose path is `prefix` (no trailing slash).

        "/v1" (or "/gpu/v1") is the usual case. A base URL without any path names the host, so "/v1" stays
        in the result. Any other prefix ("/openai") stands for "/v1": its server keeps the OpenAI paths
        right below it.
        """
        if prefix.endswith("/v1"):
            return prefix.removesuffix("/v1") + path
        if prefix and path.startswith("/v1/"):
            return prefix + path.removeprefix("/v1")
        return prefix + path

    def target(self, prefix: str, operation: str) -> str | None:
        """Where `operation` is answered behind `prefix`, or None: this runtime must not be asked for it."""
        path = self.paths.get(operation)
        return None if path is None else self.locate(prefix, path)


def parse_openai_models(body: bytes) -> tuple[str, ...]:
    """Model ids of an OpenAI list: `{"data": [{"id": "..."}]}`.

    A bare array is taken too, and entries without a usable id are passed over: proxies in front of runtimes
    are less exact than the API reference.
    """
    return _names(body, "data", "id")


def parse_openai_windows(body: bytes) -> dict[str, int]:
    """Context windows in an OpenAI list: vLLM's `max_model_len`, llama.cpp's `meta.n_ctx` (of one slot)."""
    document = orjson.loads(body)
    entries = document.get("data") if isinstance(document, dict) else document
    found = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            continue
        meta = entry.get("meta")
        window = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
        if _is_count(window):
            found[entry["id"]] = window
    return found


def parse_ollama_models(body: bytes) -> tuple[str, ...]:
    """Model names of Ollama's `GET /api/tags`: `{"models": [{"name": "smol:latest"}]}`; null if none."""
    return _names(body, "models", "name")


def parse_llamacpp_props(body: bytes) -> Details:
    """llama.cpp's `GET /props`. A router of several models has no slots of its own."""
    document = orjson.loads(body)
    slots = document.get("total_slots") if isinstance(document, dict) else None
    return Details(slots=slots if _is_count(slots) else None)


def parse_ollama_ps(body: bytes) -> Details:
    """Ollama's `GET /api/ps`: the models in memory."""
    return Details(loaded=frozenset(_names(body, "models", "name")))


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _names(body: bytes, list_key: str, name_key: str) -> tuple[str, ...]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ValueError("the model list is not JSON") from None
    if isinstance(document, dict):
        if list_key not in document:
            raise ValueError(f"the model list has no {list_key!r}")
        entries = document[list_key]
    else:
        entries = document
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise ValueError("the model list is no list")
    names = (entry.get(name_key) for entry in entries if isinstance(entry, dict))
    # Names go into headers, logs and labels: one with a line break in it would be the runtime's own words there.
    fit = (name for name in names if isinstance(name, str) and name and name.isprintable())
    return tuple(dict.fromkeys(fit))[:MODELS_MAX]
