"""Anything else that speaks OpenAI's API; nothing is known of it but that.

Only the model list is sure to exist, so it serves as the health door, and the shortest known idle time is
assumed. https://platform.openai.com/docs/api-reference
"""

from types import MappingProxyType

from gateway.runtimes.runtime import OPENAI_PATHS, RESPONSES, Runtime, parse_openai_models, parse_openai_windows

OPENAI = Runtime(
    name="openai",
    title="OpenAI-compatible",
    default_port=None,
    health_path="/v1/models",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    parse_windows=parse_openai_windows,
    paths=MappingProxyType({**OPENAI_PATHS, **RESPONSES}),
    inject_usage=True,
    idle_s=5.0,
)
