"""vLLM: `vllm serve` (uvicorn). https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html

`/health` answers 200 with an empty body, and stays open when the server has an API key. While the model
loads (half a minute and more) nothing listens at all. Idle connections are closed after exactly 5.0 s.

With `continue_final_message` (and `add_generation_prompt` false) the answer is what follows the last message.
"""

from gateway.runtimes.runtime import OPENAI_PATHS, Runtime, parse_openai_models, parse_openai_windows

VLLM = Runtime(
    name="vllm",
    title="vLLM",
    default_port=8000,
    health_path="/health",
    models_path="/v1/models",
    parse_models=parse_openai_models,
    parse_windows=parse_openai_windows,
    paths=OPENAI_PATHS,
    inject_usage=True,
    cache_salt=True,
    idle_s=5.0,
    continues="asked",
    completion_tokens=16,
)
