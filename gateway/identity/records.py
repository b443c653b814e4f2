"""What is kept of a key, and which of two versions of a record holds.

A record is never deleted: a revoked key stays, so that no copy of the records that is older can bring it back. Each
edit raises `revision`; of two records with one id the later revision holds, and on a tie an order that every process
agrees on. So records from any number of places can be put together in any order.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from gateway.identity.forms import masked
from gateway.identity.principals import PRIORITY, Principal
from gateway.limits.spec import Budget, Limit, budget_document, limit_document

_ENCODER: Final = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True)
class Previous:
    """A key's text before it was rotated, still accepted until `valid_until` (wall time)."""

    digest: str
    valid_until: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key: never its text. Times are wall time in seconds.

    `digest` is HMAC-SHA256 in hexadecimal under the pepper that `pepper` names; `models` None allows all.
    """

    id: str
    name: str
    digest: str
    created_at: float
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    pepper: str = ""
    group: str = ""
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None
    expires_at: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    revoked_at: float | None = None
    previous: tuple[Previous, ...] = ()
    revision: int = 1
    priority: str = PRIORITY
    weight: float = 1.0

    def status(self, now_unix_s: float) -> str:
        """ "active", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now_unix_s else "active"

    def principal(self, valid_until: float | None = None) -> Principal:
        """Who presents the key; `valid_until` ends it earlier (the text before a rotation)."""
        ends = [end for end in (self.expires_at, valid_until) if end is not None]
        return Principal(
            self.name,
            self.id,
            frozenset(self.roles),
            None if self.models is None else frozenset(self.models),
            self.group,
            self.limits,
            self.budget,
            min(ends, default=None),
            self.priority,
            self.weight,
        )


Records = Mapping[str, KeyRecord]


def later(one: KeyRecord, other: KeyRecord) -> KeyRecord:
    """Which of two records of one key holds. A revocation wins a tie."""
    return max(one, other, key=lambda record: (record.revision, record.revoked_at is not None, encode(record)))


def merged(records: Records, more: Iterable[KeyRecord]) -> dict[str, KeyRecord]:
    """Both together, each key by its later record."""
    found = dict(records)
    for record in more:
        known = found.get(record.id)
        if known is None:
            found[record.id] = record
        elif known != record:  # else the one that is held already: who looks at identity sees no change
            found[record.id] = later(known, record)
    return found


def encode(record: KeyRecord) -> bytes:
    """JSON; equal records give equal bytes."""
    return _ENCODER.encode(record)


def decode(raw: bytes) -> KeyRecord:
    """Raises ValueError if this is no record."""
    record = msgspec.json.decode(raw, type=KeyRecord)
    check(record)
    return record


def check(record: KeyRecord) -> None:
    """Raises ValueError if a digest is none."""
    if any(len(bytes.fromhex(one)) != 32 for one in (record.digest, *(old.digest for old in record.previous))):
        raise ValueError("a digest has not 32 bytes")


def document(record: KeyRecord, now_unix_s: float) -> dict[str, Any]:
    """What an operator is shown: JSON with plain field names, times as RFC 3339 in UTC, no digest and no text."""
    overlap = max((old.valid_until for old in record.previous if old.valid_until > now_unix_s), default=None)
    return {
        "id": record.id,
        "name": record.name,
        "origin": "created",
        "status": record.status(now_unix_s),
        **_shown(record.principal()),
        "masked": masked(record.id),
        "metadata": dict(record.metadata),
        "expires_at": rfc3339(record.expires_at),
        "created_at": rfc3339(record.created_at),
        "revoked_at": rfc3339(record.revoked_at),
        "previous_valid_until": rfc3339(overlap),
        "revision": record.revision,
    }


def configured_document(principal: Principal) -> dict[str, Any]:
    """The same of a key of the environment."""
    return {
        "id": principal.key_id,
        "name": principal.name,
        "origin": "environment",
        "status": "active",
        **_shown(principal),
        "masked": "…",
        "metadata": {},
        "expires_at": None,
        "created_at": None,
        "revoked_at": None,
        "previous_valid_until": None,
        "revision": 0,
    }


def _shown(principal: Principal) -> dict[str, Any]:
    return {
        "group": principal.group,
        "roles": sorted(principal.roles),
        "models": None if principal.models is None else sorted(principal.models),
        "limits": [limit_document(limit) for limit in principal.limits],
        "budget": None if principal.budget is None else budget_document(principal.budget),
        "priority": principal.priority,
        "weight": principal.weight,
    }


def rfc3339(unix_s: float | None) -> str | None:
    if unix_s is None:
        return None
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
