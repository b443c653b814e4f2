"""`/admin/api/keys`: keys are made, shown, changed, rotated and revoked here. The role "admin" is needed throughout.

    GET    /admin/api/keys               {"rows": [key …]}
    POST   /admin/api/keys               201 {"key": text, …key}; the text is shown here and never again
    GET    /admin/api/keys/{id}          key
    PATCH  /admin/api/keys/{id}          key; only the fields that are sent change
    DELETE /admin/api/keys/{id}          key, revoked
    POST   /admin/api/keys/{id}/rotate   {"key": text, …key}; body {"overlap": "24h"} or none

The fields are those of `gateway.identity.fields`, a key is shown as `gateway.identity.records.document` gives it.
Keys of the environment are listed with `"origin": "environment"`; they are changed where they stand (409).
"""

from __future__ import annotations

import logging
from typing import Any, Final

import orjson
from aiohttp import web

from gateway.admin import Guarded, Routes, path_argument
from gateway.answer import EXCHANGE, send_json
from gateway.errors import BadRequest, GatewayError
from gateway.identity import fields
from gateway.identity.book import KeyBook
from gateway.identity.keyfile import KeyFileError
from gateway.identity.records import KeyRecord, document
from gateway.passage.resolve import BodyLimits, read_body

_log = logging.getLogger("gateway.keys")

OVERLAP: Final = "24h"

_BODY: Final = BodyLimits(max_bytes=256 * 1024, timeout_s=10.0, min_rate=0)


def routes(book: KeyBook) -> Routes:
    keys = Keys(book)
    return {
        "/admin/api/keys": {"GET": Guarded(keys.rows), "POST": Guarded(keys.create)},
        "/admin/api/keys/{id}": {
            "GET": Guarded(keys.show),
            "PATCH": Guarded(keys.edit),
            "DELETE": Guarded(keys.revoke),
        },
        "/admin/api/keys/{id}/rotate": {"POST": Guarded(keys.rotate)},
    }


class Keys:
    """The handlers."""

    def __init__(self, book: KeyBook) -> None:
        self._book = book

    async def rows(self, request: web.BaseRequest) -> web.StreamResponse:
        return send_json(request, {"rows": self._book.rows()})

    async def create(self, request: web.BaseRequest) -> web.StreamResponse:
        wanted = fields.read(await _document(request), self._book.clock(), new=True)
        try:
            key, record = await self._book.create(wanted)
        except (KeyFileError, OSError) as error:
            raise _unstored(error) from error
        self._log(request, "created", record)
        return send_json(request, {"key": key, **self._document(record)}, 201)

    async def show(self, request: web.BaseRequest) -> web.StreamResponse:
        id = path_argument(request)
        if id in self._book.ring.configured:
            return send_json(request, next(row for row in self._book.rows() if row["id"] == id))
        return send_json(request, self._document(self._book.find(id)))

    async def edit(self, request: web.BaseRequest) -> web.StreamResponse:
        id = self._changeable(request)
        changes = fields.read(await _document(request), self._book.clock(), new=False)
        try:
            record = await self._book.edit(id, changes)
        except (KeyFileError, OSError) as error:
            raise _unstored(error) from error
        self._log(request, f"changed ({', '.join(sorted(changes))})", record)
        return send_json(request, self._document(record))

    async def revoke(self, request: web.BaseRequest) -> web.StreamResponse:
        id = self._changeable(request)
        await _nothing(request)
        try:
            record = await self._book.revoke(id)
        except (KeyFileError, OSError) as error:
            raise _unstored(error) from error
        self._log(request, "revoked", record)
        return send_json(request, self._document(record))

    async def rotate(self, request: web.BaseRequest) -> web.StreamResponse:
        id = self._changeable(request)
        wanted = await _document(request, empty={})
        if not isinstance(wanted, dict):
            raise BadRequest("the body must be a JSON object", code="invalid_field")
        fields.known(wanted, {"overlap": None})
        overlap_s = fields.duration_s(wanted.get("overlap", OVERLAP), "overlap")
        try:
            key, record = await self._book.rotate(id, overlap_s)
        except (KeyFileError, OSError) as error:
            raise _unstored(error) from error
        self._log(request, "rotated", record)
        return send_json(request, {"key": key, **self._document(record)})

    def _changeable(self, request: web.BaseRequest) -> str:
        id = path_argument(request)
        if id in self._book.ring.configured:
            raise BadRequest("this key stands in GATEWAY_API_KEYS: change it there", code="key_conflict", status=409)
        return id

    def _document(self, record: KeyRecord) -> dict[str, Any]:
        return document(record, self._book.clock())

    def _log(self, request: web.BaseRequest, what: str, record: KeyRecord) -> None:
        by = request[EXCHANGE].principal
        _log.info("key %s (%s) %s by %s (%s)", record.id, record.name, what, by.key_id, by.name)


def _unstored(error: KeyFileError | OSError) -> GatewayError:
    _log.error("keys cannot be stored: %s", error)
    return GatewayError("keys cannot be stored now: the gateway's log says why", code="keys_not_stored", status=503)


async def _document(request: web.BaseRequest, empty: object = None) -> object:
    """The body's JSON; `empty` for no body, if that is allowed."""
    raw = await read_body(request, _BODY)
    if not raw and empty is not None:
        return empty
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise BadRequest("the body is not JSON", code="invalid_json") from None


async def _nothing(request: web.BaseRequest) -> None:
    if await read_body(request, _BODY):
        raise BadRequest("this request carries no body", code="invalid_request")
