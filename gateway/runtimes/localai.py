"""LocalAI. https://localai.io/features/

`/readyz` and `/healthz` are its probes. The idle time is not published: the shortest one known is assumed.
"""

from types import MappingProxyType

from gateway.runtimes.runtime import OPENAI_PATHS, RERANK, RESPONSES, Runtime, parse_openai_models

LOCALAI = Runtime(
    name="localai",
    title="LocalAI",
    default_port=8080,
    health_path="/readyz",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    paths=MappingProxyType({**OPENAI_PATHS, **RESPONSES, **RERANK}),
    inject_usage=True,
    idle_s=5.0,
)
