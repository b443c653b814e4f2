"""vLLM: `vllm serve` (uvicorn). https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html

`/health` answers 200 with an empty body, and stays open when the server has an API key. While the model
loads (half a minute and more) nothing listens at all. Idle connections are closed after exactly 5.0 s.

Its metrics page says how many blocks its KV cache has, which it decides at start, and how large they are.

With `continue_final_message` (and `add_generation_prompt` false) the answer is what follows the last message.
"""

import re
from types import MappingProxyType
from typing import Final

from gateway.runtimes.runtime import (
    COUNT_TOKENS,
    MESSAGES,
    OPENAI_PATHS,
    RERANK,
    RESPONSES,
    Runtime,
    parse_openai_models,
    parse_openai_windows,
)

_CACHE: Final = re.compile(rb"^vllm:cache_config_info\{([^}\n]*)\}", re.MULTILINE)
_LABEL: Final = re.compile(rb'(block_size|num_gpu_blocks)="(\d{1,12})"')


def parse_cache(body: bytes) -> int:
    """Tokens of the KV cache, as `vllm:cache_config_info` tells them; of several engines behind an address all."""
    tokens = 0
    for found in _CACHE.finditer(body):
        told = {name: int(value) for name, value in _LABEL.findall(found[1])}
        tokens += told.get(b"block_size", 0) * told.get(b"num_gpu_blocks", 0)
    return tokens


VLLM = Runtime(
    name="vllm",
    title="vLLM",
    default_port=8000,
    health_path="/health",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    parse_windows=parse_openai_windows,
    paths=MappingProxyType({**OPENAI_PATHS, **RESPONSES, **MESSAGES, **COUNT_TOKENS, **RERANK}),
    inject_usage=True,
    cache_salt=True,
    cache_path="/metrics",
    parse_cache=parse_cache,
    idle_s=5.0,
    continues="asked",
    completion_tokens=16,
)
