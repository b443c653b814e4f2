"""`GET /admin/api/queue`: who waits for room on an upstream, in the order in which they would be served. Role "admin".

    {"waiting": 3, "most": 1000, "rows": [{"position": 1, "class": "high", "tenant": "research", "key": "ci", "model":
     "qwen3-32b", "request_id": "req-…", "waited_s": 0.8, "upstreams": ["gpu1"]}, …]}

`tenant` is a group, or the id of a key without one. The order holds if nobody comes and no answer that runs is charged;
among waits for different upstreams it says nothing of who is first. `?limit=100` gives the first so many.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from aiohttp import web

from gateway.admin import Guarded, Routes
from gateway.answer import send_json
from gateway.dispatch.gate import Gate
from gateway.errors import BadRequest

ROWS: Final = 100


def routes(gate: Gate) -> Routes:
    return {"/admin/api/queue": {"GET": Guarded(Queue(gate).rows)}}


class Queue:
    """The handler."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def rows(self, request: web.BaseRequest) -> web.StreamResponse:
        limit = request.query.get("limit", str(ROWS))
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10):
            raise BadRequest("`limit` must be a whole number", param="limit")
        queue = self._gate.queue
        rows = list(islice(self._gate.rows(), int(limit)))
        return send_json(request, {"waiting": len(queue), "most": queue.most, "rows": rows})
