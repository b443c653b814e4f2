"""A foreign document, taken apart key by key: what nobody took is told at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Note(NamedTuple):
    """Something of the original that is not in the result, or not as it was: where it stood, and why."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class Notes(list[Note]):
    def add(self, path: str, message: str) -> None:
        self.append(Note(path, message))


class Section:
    """One mapping. `take` gives a value once; `rest` names the keys that were never taken."""

    def __init__(self, raw: object, path: str, notes: Notes) -> None:
        self.path = path
        self._notes = notes
        self._left: dict[str, Any] = {}
        if isinstance(raw, dict):
            self._left = {str(key): value for key, value in raw.items()}
        elif raw is not None:
            notes.add(path, "is no mapping, and is left out")

    def take(self, key: str) -> Any:
        """The value, None if there is none."""
        return self._left.pop(key, None)

    def text(self, key: str) -> str:
        raw = self.take(key)
        if raw is None or isinstance(raw, str):
            return raw or ""
        self._notes.add(f"{self.path}.{key}", "is no text, and is left out")
        return ""

    def left(self) -> list[str]:
        """The keys that were not taken yet."""
        return list(self._left)

    def number(self, key: str, *, zero: bool = False) -> float | None:
        """A number above zero, also as text; with `zero` that too."""
        raw = self.take(key)
        if raw is None:
            return None
        try:
            value = float(raw) if not isinstance(raw, bool) else -1.0
        except (TypeError, ValueError):
            value = -1.0
        if 0.0 < value < float("inf") or (zero and value == 0.0):
            return value
        self._notes.add(f"{self.path}.{key}", "is no number that can be used, and is left out")
        return None

    def section(self, key: str) -> Section:
        return Section(self.take(key), f"{self.path}.{key}" if self.path else key, self._notes)

    def items(self, key: str) -> Iterator[tuple[str, Any]]:
        """The elements of a list, each with its path."""
        raw = self.take(key)
        path = f"{self.path}.{key}" if self.path else key
        if raw is not None and not isinstance(raw, list):
            self._notes.add(path, "is no list, and is left out")
            return
        for index, element in enumerate(raw or ()):
            yield f"{path}[{index}]", element

    def ignore(self, *keys: str) -> None:
        """These mean nothing here, and nobody misses them."""
        for key in keys:
            self._left.pop(key, None)

    def left_out(self, reasons: dict[str, str]) -> None:
        """Name what was not taken, with the reason where one is known."""
        for key in self._left:
            self._notes.add(
                f"{self.path}.{key}" if self.path else key, reasons.get(key, "is not understood, and is left out")
            )
        self._left = {}
