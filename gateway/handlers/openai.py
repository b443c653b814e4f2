"""The OpenAI surface: chat, completions, Responses, embeddings, the list of models; and reranking, which has its form.

A response in the background would be made after its answer, where no meter sees it. What a runtime keeps of responses
cannot be asked for here.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gateway.answer import EXCHANGE, send_json
from gateway.catalog import Catalog
from gateway.passage.proxy import Surface

SURFACES: Final = {
    "/v1/chat/completions": Surface("chat", "chat", needs="messages"),
    "/v1/completions": Surface("completions", "text_completion", needs="prompt"),
    "/v1/responses": Surface("responses", "chat", needs="input", family="responses", never="background"),
    "/v1/embeddings": Surface("embeddings", "embeddings", needs="input", streams=None),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), Surface("rerank", "rerank", needs="query", streams=None)),
}


class Models:
    """`GET /v1/models`: what this key may ask for, aliases included, in OpenAI's list shape."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        principal = request[EXCHANGE].principal
        data = []
        for name, offers in self._catalog.table.pools.items():
            allowed = [one for one in offers if principal is None or principal.may_use(one.model.name)]
            if not allowed:
                continue
            model, upstream = allowed[0].model, allowed[0].upstream
            entry = {"id": name, "object": "model", "created": 0, "owned_by": upstream.provider}
            window = model.context_window or upstream.windows.get(model.name)
            if window is not None:
                entry["max_model_len"] = window
            data.append(entry)
        return send_json(request, {"object": "list", "data": data})
