"""LM Studio's local server (Node). https://lmstudio.ai/docs/app/api/endpoints/openai

It has no health door; the model list loads nothing and serves as one.
"""

from gateway.runtimes.runtime import OPENAI_PATHS, Runtime, parse_openai_models

LMSTUDIO = Runtime(
    name="lmstudio",
    title="LM Studio",
    default_port=1234,
    health_path="/v1/models",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    paths=OPENAI_PATHS,
    inject_usage=True,
    idle_s=5.0,
)
