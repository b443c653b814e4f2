"""llama.cpp's `llama-server`. https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md

`/health` is 503 "Loading model" until the model is in memory, and stays open when the server has an API
key. The connection is closed after every streamed answer, though the headers promise keep-alive; otherwise
after 5 s.

`/props` has `total_slots`, and wakes no model that sleeps; `/v1/models` has `meta.n_ctx`, which is one slot's.

The last chunk of each choice carries `timings`, with the counts of a usage, unless usage was asked for: then they move
to usage chunks (one for each choice, too). So nothing is asked for, and the client gets its stream byte for byte.

A final assistant message is gone on with, asked or not. Streamed, the answer is what follows it; whole, it repeats it.
"""

from types import MappingProxyType

from gateway.runtimes.runtime import (
    COUNT_TOKENS,
    MESSAGES,
    OPENAI_PATHS,
    RERANK,
    RESPONSES,
    Runtime,
    parse_llamacpp_props,
    parse_openai_models,
    parse_openai_windows,
)

LLAMACPP = Runtime(
    name="llamacpp",
    title="llama.cpp",
    default_port=8080,
    health_path="/health",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    parse_windows=parse_openai_windows,
    details_path="/props",
    parse_details=parse_llamacpp_props,
    paths=MappingProxyType({**OPENAI_PATHS, **RESPONSES, **MESSAGES, **COUNT_TOKENS, **RERANK}),
    inject_usage=False,
    idle_s=5.0,
    continues="always",
)
