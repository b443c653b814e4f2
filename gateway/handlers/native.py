"""Ollama's own API, for its clients: `/api/chat`, `/api/generate`, `/api/embed`, and what they look at first.

https://docs.ollama.com/api. Models are asked for as everywhere; lists come from the catalog, so a key sees what it may
use, and no Ollama is asked. What changes or shows one (pull, create, copy, push, delete, blobs, show) is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from gateway import __version__
from gateway.answer import EXCHANGE, send_json
from gateway.passage.proxy import Surface

if TYPE_CHECKING:
    from gateway.catalog import Catalog, Offer
    from gateway.identity.principals import Principal

#: streams, unless the client says otherwise
SURFACES: Final = {
    "/api/chat": Surface("ollama_chat", "chat", needs="messages", family="ollama", streams=True),
    "/api/generate": Surface("ollama_generate", "text_completion", needs="prompt", family="ollama", streams=True),
    "/api/embed": Surface("ollama_embed", "embeddings", needs="input", family="ollama", streams=None),
    "/api/embeddings": Surface("ollama_embeddings", "embeddings", needs="prompt", family="ollama", streams=None),
}


class Models:
    """`GET /api/tags`: the names this key may ask for here; `loaded`: `GET /api/ps`, those in memory somewhere."""

    def __init__(self, catalog: Catalog, *, loaded: bool = False) -> None:
        self._catalog = catalog
        self._loaded = loaded

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        principal = request[EXCHANGE].principal
        models: list[dict[str, Any]] = []
        for name, offers in self._catalog.table.pools.items():
            able = list(_able(offers, principal))
            if self._loaded:
                able = [offer for offer in able if offer.upstream.tells_loaded and not offer.unloaded]
            if able:
                models.append({"name": name, "model": name, "details": {}})
        return send_json(request, {"models": models})


class Version:
    """`GET /api/version`: ours."""

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        return send_json(request, {"version": __version__})


def _able(offers: tuple[Offer, ...], principal: Principal | None) -> Iterator[Offer]:
    for offer in offers:
        may = principal is None or principal.may_use(offer.model.name)
        if may and "ollama_chat" in offer.upstream.runtime.paths:
            yield offer
