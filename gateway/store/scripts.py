"""Lua scripts, known to the server by their digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the store runs it: EVALSHA with its digest, EVAL with its text where the server forgot it.

    Keys come in KEYS only (Cluster routes by them), all made by `Store.key`. `name` is for logs and repr.
    """

    name: str
    text: str = field(repr=False)
    sha: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False)  # EVALSHA's own choice
        object.__setattr__(self, "sha", digest.hexdigest())
