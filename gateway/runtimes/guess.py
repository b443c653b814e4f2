"""Which runtime is it? Told from what a free GET shows, for addresses nobody has described."""

from __future__ import annotations

from typing import Final

import orjson

#: `owned_by` in a model list -> runtime. LocalAI sets none, which is how it differs from llama.cpp on 8080.
_OWNERS: Final = {
    "vllm": "vllm",
    "llamacpp": "llamacpp",
    "library": "ollama",
    "organization_owner": "lmstudio",
}
#: LiteLLM stamps every model with this time (its `DEFAULT_MODEL_CREATED_AT_TIME`), whoever serves it.
_LITELLM_CREATED: Final = 1677610602


def guess(server: str, models: bytes) -> str:
    """Name of the runtime that sent this `Server` header and this model list (`/v1/models` or `/api/tags`).

    A key of `RUNTIMES`; "openai" if it is an OpenAI list that nothing tells apart. Raises ValueError if the
    body is no model list at all: some other web server.
    """
    try:
        document = orjson.loads(models)
    except orjson.JSONDecodeError:
        raise ValueError("the model list is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("the model list is no object")
    if server.lower().startswith("llama.cpp"):
        return "llamacpp"
    entries = document.get("data")
    if entries is None and "data" not in document:
        if "models" in document:
            return "ollama"
        raise ValueError("neither 'data' nor 'models' in the model list")
    first = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else None
    if first is None:
        return "openai"
    owner = first.get("owned_by")
    if isinstance(owner, str) and owner in _OWNERS:
        return _OWNERS[owner]
    if first.get("created") == _LITELLM_CREATED:
        return "litellm"
    if owner is None and "id" in first and set(first) <= {"id", "object"}:
        return "localai"
    return "openai"
