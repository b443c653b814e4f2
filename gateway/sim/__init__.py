"""The simulated engine: a faithful fake runtime for tests, demonstrations and benchmarks. It is no language model.

It speaks vLLM's dialect over a real socket, with deterministic text, vLLM's scheduling and prefix cache as a model,
and faults on demand. May import: stdlib, orjson, msgspec, httptools; of the gateway only `routing`,
and that in `replay`. `engine`, `text`, `faults`, `dialect` and `shapes` do no I/O.

    async with SimServer(models=("sim",)) as sim:      # instant; Engine(speed=1.0) for an H100-like pace
        sim.url                                        # "http://127.0.0.1:PORT/v1"; sim.root without /v1
        sim.faults = {"status": 503, "times": 1}       # any time; fields: `Faults`; {} switches them off
        sim.requests[-1].method, .target, .headers, .header("host"), .body, .json(), .connection, .closed_at
        sim.kill(); await sim.revive()                 # a process's death (kill -9) and restart, on the same port
        sim.connections_open, sim.connections_total, sim.requests_total, sim.aborted, sim.engine.running

Constructor: `SimServer(models=("sim",), *, engine=None, faults=None, ssl=None, host="127.0.0.1", port=0,
context=32768, keep=1000, keep_alive_s=5.0, api_key="", opening="", start_delay_s=0.0, metrics_lag_s=0.0,
runtime="vllm")`; "llamacpp" has that one's ways. Faults of one request: JSON field
`"sim": {"cut_at_token": 3}` or the header `x-sim-fault: cut_at_token=3; token_s=0.01`. Server-wide faults apply to
POST requests, or to the targets that begin with one of `paths` (`{"status": 503, "paths": ["/"]}`: everything).

Answers: without `max_tokens` 64 tokens ending in "stop" (the end token counts); with it exactly that many, "length";
`"sim": {"tokens": 20}` sets the natural length. The same model and prompt always give the same text; given its
beginning (a final message to continue, a prompt that ends with it), its rest. A tool is called when `tool_choice` is
"required" or names it, or with `"sim": {"tool_call": true}`.

    engine    the engine model, pure, on a clock passed in
    text      tokenizer, sentences, vectors
    faults    Faults: what to do wrong
    dialect   request body -> Call, errors; shapes: Call -> bytes; exposition: /metrics
    runtimes  what differs from vLLM elsewhere: llama.cpp
    listener, connection, response, generation, server    the socket side
    control   the door by which a running fleet is broken and mended: faults, kill, revive
    replay/   `llm-gateway sim replay`: policies on a virtual clock; a room of its own
    cli       `llm-gateway sim serve | replay`, and `demo_engine()`, the provider shown when no runtime is found
"""

from gateway.sim.cli import demo_engine
from gateway.sim.engine import Engine, Pace
from gateway.sim.faults import Faults
from gateway.sim.server import SimServer

__all__ = ["Engine", "Faults", "Pace", "SimServer", "demo_engine"]
