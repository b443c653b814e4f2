"""A heap whose keys may change."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)
Key = tuple[float, float]


class Heap(Generic[H]):
    """Items, least key first, whose keys may change. An outdated entry is dropped when it surfaces, or with all the
    others once they are the most.
    """

    __slots__ = ("_entries", "_keys", "_serial")

    def __init__(self) -> None:
        self._keys: dict[H, Key] = {}
        self._entries: list[tuple[Key, int, H]] = []
        self._serial = count().__next__

    def __len__(self) -> int:
        return len(self._keys)

    def set(self, item: H, key: Key) -> None:
        """Add the item, or move it."""
        if self._keys.get(item) == key:
            return
        self._keys[item] = key
        heappush(self._entries, (key, self._serial(), item))
        if len(self._entries) > 2 * len(self._keys) + 16:
            self._entries = [entry for entry in self._entries if self._keys.get(entry[2]) == entry[0]]
            heapify(self._entries)

    def drop(self, item: H) -> None:
        self._keys.pop(item, None)
        if not self._keys:
            self._entries.clear()

    def first(self) -> H | None:
        entries = self._entries
        while entries:
            key, _, item = entries[0]
            if self._keys.get(item) == key:
                return item
            heappop(entries)
        return None
