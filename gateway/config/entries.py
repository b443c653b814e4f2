"""Entries: the objects inside a configured array, taken apart key by key, with everything wrong reported."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from gateway.config import parsing
from gateway.config.parsing import Collector, Refused

T = TypeVar("T")

#: what other programs call the same thing
_MEANT: Final = {
    "name": ("provider", "apiName"),
    "id": ("apiName",),
    "model": ("apiName", "models"),
    "url": ("baseUrl",),
    "api_base": ("baseUrl",),
    "key": ("apiKey",),
    "tools": ("supportsTools",),
}


class Report:
    """Where entries report to: the problems, and by configuration path the origin of each value.

    `source` is the source being read (".env:3").
    """

    def __init__(self, collect: Collector) -> None:
        self.collect = collect
        self.source = ""
        self.origins: dict[str, str] = {}


class Item:
    """One element of a list in an entry: its value, and its key ("aliases[2]")."""

    __slots__ = ("key", "value")

    def __init__(self, key: str, value: Any) -> None:
        self.key = key
        self.value = value


class Entry:
    """One object of the configuration. Reports what it cannot read, and keys nobody knows, as it is taken apart.

    `path` names it in problems, `origin` in words for its values, `config_path` in `Config.origins`.
    """

    __slots__ = ("broken", "config_path", "known", "origin", "path", "raw", "report", "spelled")

    def __init__(
        self, report: Report, raw: object, path: str, origin: str, config_path: str, known: tuple[str, ...]
    ) -> None:
        self.report = report
        self.path = path
        self.origin = origin
        self.config_path = config_path
        self.known = known
        self.raw: dict[str, Any] = {}
        self.spelled: dict[str, str] = {}
        self.broken = not isinstance(raw, dict)
        report.origins[config_path] = origin
        if isinstance(raw, dict):
            self._keys(raw)
        else:
            report.collect.refuse(path, report.source, Refused("must be an object"), raw)

    def _keys(self, raw: dict[str, Any]) -> None:
        names = {key: key for key in self.known} | {snake(key): key for key in self.known}
        for written, value in raw.items():
            key = names.get(written)
            shown = written if written.isprintable() and len(written) <= 60 else "…"
            if key is None:
                meant = next((m for m in _MEANT.get(snake(written), ()) if m in self.known), "")
                near = meant or parsing.nearest(written, self.known)
                self.report.collect.add(
                    f"{self.path}.{shown}",
                    self.report.source,
                    "unknown key",
                    nearest=near,
                    hint="" if near else _list(self.known),
                )
            elif key in self.raw:
                self.add(written, f"given twice, also as {self.spelled[key]}")
            else:
                self.raw[key] = value
                self.spelled[key] = written

    def at(self, key: str) -> str:
        head, bracket, rest = key.partition("[")
        return f"{self.path}.{self.spelled.get(head, head)}{bracket}{rest}"

    def where(self, key: str) -> str:
        return f"{self.origin}.{self.spelled.get(key, key)}"

    def add(self, key: str, message: str, *, hint: str = "") -> None:
        self.report.collect.add(self.at(key), self.report.source, message, hint=hint)

    def take(
        self,
        key: str,
        parse: Callable[[object], T],
        default: T,
        *,
        required: bool = False,
        null: bool = False,
    ) -> T:
        """The value of `key`, or `default` if it is left out, null (unless `null` is a value) or unusable."""
        raw = self.raw.get(key)
        if key not in self.raw or (raw is None and not null):
            if required and not self.broken:
                self.add(key, "is missing")
            self.report.origins[f"{self.config_path}.{snake(key)}"] = "default"
            return default
        try:
            return parse(raw)
        except Refused as refused:
            self.report.collect.refuse(self.at(key), self.report.source, refused, raw)
            return default

    def items(self, key: str, parse: Callable[[object], T]) -> list[Item]:
        """The usable elements of the list at `key`; an empty list if it is left out."""
        raw = self.raw.get(key)
        if raw is None:
            return []
        if not isinstance(raw, list):
            self.report.collect.refuse(self.at(key), self.report.source, Refused("must be an array"), raw)
            return []
        found = []
        for index, element in enumerate(raw):
            try:
                found.append(Item(f"{key}[{index}]", parse(element)))
            except Refused as refused:
                self.report.collect.refuse(self.at(f"{key}[{index}]"), self.report.source, refused, element)
        return found

    def enter(self, key: str, known: tuple[str, ...]) -> Entry | None:
        """The object at `key`, or None if it is left out."""
        if self.raw.get(key) is None:
            self.report.origins[f"{self.config_path}.{snake(key)}"] = "default"
            return None
        config_path = f"{self.config_path}.{snake(key)}"
        return Entry(self.report, self.raw[key], self.at(key), self.where(key), config_path, known)


def snake(key: str) -> str:
    """ "baseUrl" -> "base_url"."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()


def _list(names: Any) -> str:
    return "valid: " + ", ".join(names)
