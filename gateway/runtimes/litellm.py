"""LiteLLM's proxy (uvicorn). https://docs.litellm.ai/docs/proxy/health

Never GET `/health` here: it makes a real call to every model. `/health/liveliness` (sic) touches none.
"""

from types import MappingProxyType

from gateway.runtimes.runtime import (
    COUNT_TOKENS,
    MESSAGES,
    OPENAI_PATHS,
    RERANK,
    RESPONSES,
    Runtime,
    parse_openai_models,
)

LITELLM = Runtime(
    name="litellm",
    title="LiteLLM",
    default_port=4000,
    health_path="/health/liveliness",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    paths=MappingProxyType({**OPENAI_PATHS, **RESPONSES, **MESSAGES, **COUNT_TOKENS, **RERANK}),
    inject_usage=True,
    idle_s=5.0,
)
