"""LiteLLM's proxy (uvicorn). https://docs.litellm.ai/docs/proxy/health

Never GET `/health` here: it makes a real call to every model. `/health/liveliness` (sic) touches none.
"""

from gateway.runtimes.runtime import OPENAI_PATHS, Runtime, parse_openai_models

LITELLM = Runtime(
    name="litellm",
    title="LiteLLM",
    default_port=4000,
    health_path="/health/liveliness",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    paths=OPENAI_PATHS,
    inject_usage=True,
    idle_s=5.0,
)
