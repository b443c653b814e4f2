"""What was used, over HTTP.

    GET /admin/api/usage?by=key,model,day&since=7d&until=…   everybody's; needs the role "admin"
    GET /v1/usage?by=model,day&since=7d&until=…              the asking key's own

Both answer {"since", "until": ISO 8601, "by": [name …], "rows": [{…}]}; the fields of a row are those of
`gateway.ledger.totals`. `since` (7d by default, rounded down to the hour) and `until` (now) are spans or ISO times.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gateway.admin import Guarded, Routes
from gateway.answer import EXCHANGE, send_json
from gateway.errors import BadRequest, NoCapacity
from gateway.ledger.report import BadQuery, Window, usage
from gateway.store.client import StoreAway

if TYPE_CHECKING:
    from gateway.store.client import Store


def routes(root: Path, store: Store | None) -> Routes:
    """`root` is the folder of the journals."""
    reading = Usage(root, store)
    return {"/admin/api/usage": {"GET": Guarded(reading.all)}, "/v1/usage": {"GET": reading.own}}


class Usage:
    """The handlers."""

    def __init__(self, root: Path, store: Store | None) -> None:
        self._root = root
        self._store = store
        #: a report reads files and many sums; asking twice at once must not cost twice the disk
        self._turn = asyncio.Lock()

    async def all(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._answer(request, None)

    async def own(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._answer(request, request[EXCHANGE].key)

    async def _answer(self, request: web.BaseRequest, key: str | None) -> web.StreamResponse:
        asked: dict[str, str] = dict(request.query)
        for name in asked:
            if name not in ("by", "since", "until"):
                raise BadRequest(f"unknown parameter {name[:40]!r}: there are by, since, until", param=name[:40])
        try:
            window = Window.parse(
                asked.get("by", "model"), asked.get("since", "7d"), asked.get("until", ""), datetime.now(UTC)
            )
        except BadQuery as error:
            raise BadRequest(str(error)) from error
        try:
            async with self._turn:
                rows = await usage(self._root, self._store, window, key=key)
        except StoreAway as error:
            raise NoCapacity("the store is away, so the ledger cannot be read; try again", retry_after_s=2.0) from error
        document: dict[str, Any] = {**window.document(), "rows": rows}
        return send_json(request, document)
