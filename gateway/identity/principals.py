"""Principals: who a request speaks for, and what that one may do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a key.

    `key_id` is public and names the key in logs and records. `models` is the set of catalog names the key may
    use, None for all; it is asked about the final model, after aliases and on fallbacks.
    """

    name: str
    key_id: str
    roles: frozenset[str] = frozenset()
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models
