"""Ollama: its OpenAI side and its native API. https://docs.ollama.com/api

There is no `/health` (404); `/api/version` is free and loads no model. `/api/tags` lists names with their tag
("smol:latest"), though "smol" is accepted; `/api/ps` lists those in memory, and loads none. `/api/delete` is a DELETE
with a JSON body. An idle connection was still open after 12 s.
"""

from types import MappingProxyType

from gateway.runtimes.runtime import MESSAGES, OPENAI_PATHS, RESPONSES, Runtime, parse_ollama_models, parse_ollama_ps

OLLAMA = Runtime(
    name="ollama",
    title="Ollama",
    default_port=11434,
    health_path="/api/version",
    models_path="/api/tags",
    parse_models=parse_ollama_models,
    details_path="/api/ps",
    parse_details=parse_ollama_ps,
    paths=MappingProxyType(
        {
            **OPENAI_PATHS,
            **RESPONSES,
            **MESSAGES,
            "ollama_chat": "/api/chat",
            "ollama_generate": "/api/generate",
            "ollama_embed": "/api/embed",
            "ollama_embeddings": "/api/embeddings",
            "ollama_list": "/api/tags",
        }
    ),
    inject_usage=True,
    idle_s=12.0,
    manage=MappingProxyType({"pull": "/api/pull", "delete": "/api/delete"}),
)
