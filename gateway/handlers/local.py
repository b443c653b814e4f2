"""The API of record: `/api/local-llm/proxy` (unstreamed) and `/api/local-llm/stream`.

Body: `{provider?, model, messages, …}`; everything else passes verbatim. The answer is the upstream's own: OpenAI's
chat shape, or Ollama's native one where Ollama answers (so a stream is SSE or NDJSON; its Content-Type says which).
"""

from __future__ import annotations

from typing import Final

from gateway.passage.proxy import Surface

SURFACES: Final = {
    "/api/local-llm/proxy": Surface("chat", "chat", needs="messages", native="ollama_chat", stream=False, local=True),
    "/api/local-llm/stream": Surface("chat", "chat", needs="messages", native="ollama_chat", stream=True, local=True),
}
