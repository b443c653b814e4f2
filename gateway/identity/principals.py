"""Principals: who a request speaks for, and what that one may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.limits.spec import Budget, Limit
from gateway.queueing.fair import PRIORITIES

#: may see and change everything under `/admin/`
ADMIN: Final = "admin"
ROLES: Final = (ADMIN,)
#: the class in which a key's requests wait, unless it says another
PRIORITY: Final = "normal"
_RANKS: Final = {priority: rank for rank, priority in enumerate(PRIORITIES)}


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a key.

    `key_id` is public and names the key in logs and records; it stays the same when the key is rotated. `models` is
    the set of catalog names the key may use, None for all; it is asked about the final model, after aliases and on
    fallbacks. `expires_at` is wall time in seconds, None for never. `priority` and `weight` say how its requests wait
    while every upstream is full: in which class, and with what share among the tenants of that class.
    """

    name: str
    key_id: str
    roles: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    group: str = ""
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None
    expires_at: float | None = None
    priority: str = PRIORITY
    weight: float = 1.0

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    @property
    def tenant(self) -> str:
        """Whose share of a full fleet it uses: its group's, or its own."""
        return self.group or self.key_id

    def rank(self, asked: str | None) -> int:
        """The class of a request that asks for the priority `asked`: the key's own, or a lower one."""
        own = _RANKS[self.priority]
        return own if asked is None else max(own, _RANKS.get(asked.lower(), own))
