"""Principals: who a request speaks for, and what that one may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.limits.spec import Budget, Limit

#: may see and change everything under `/admin/`
ADMIN: Final = "admin"
ROLES: Final = (ADMIN,)


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a key.

    `key_id` is public and names the key in logs and records; it stays the same when the key is rotated. `models` is
    the set of catalog names the key may use, None for all; it is asked about the final model, after aliases and on
    fallbacks. `expires_at` is wall time in seconds, None for never.
    """

    name: str
    key_id: str
    roles: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    group: str = ""
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None
    expires_at: float | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models
