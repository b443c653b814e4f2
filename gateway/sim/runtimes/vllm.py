"""vLLM 0.32.0's OpenAI API server (uvicorn); its requests and chunks are `sim.dialect` and `sim.shapes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from gateway.sim.dialect import ERROR_EVENT, VERSION, error_body, load, parse_call
from gateway.sim.exposition import exposition
from gateway.sim.runtimes.runtime import Runtime
from gateway.sim.shapes import Shape, models_body

if TYPE_CHECKING:
    from gateway.sim.server import SimServer

_JSON = "application/json"


def _metrics(server: SimServer) -> tuple[str, bytes]:
    return "text/plain; version=0.0.4; charset=utf-8", server.metrics_page().encode()


def _models(server: SimServer) -> tuple[str, bytes]:
    return _JSON, models_body(server.models, server.context, server.created())


VLLM = Runtime(
    name="vllm",
    headers=b"server: simulated-engine\r\nvary: Origin\r\n",
    dated=True,
    stream_type="text/event-stream; charset=utf-8",
    pages={
        "/health": lambda server: ("", b""),
        "/metrics": _metrics,
        "/version": lambda server: (_JSON, orjson.dumps({"version": VERSION})),
        "/v1/models": _models,
    },
    exposition=exposition,
    calls={"/v1/chat/completions": True, "/v1/completions": False},
    embeddings="/v1/embeddings",
    not_found=b'{"detail":"Not Found"}',
    wrong_method=b'{"detail":"Method Not Allowed"}',
    unauthorized=b'{"error":"Unauthorized"}',
    load=load,
    parse=parse_call,
    shape=Shape,
    error=error_body,
    error_event=ERROR_EVENT,
)
