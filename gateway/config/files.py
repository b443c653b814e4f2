"""The files that a configuration is read from: each with a mark, by which its next change is seen."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import orjson

from gateway.config.model import Mark
from gateway.config.parsing import Collector


def mark(path: Path) -> Mark:
    """What `path` is now; it follows links, so that a swapped one (a Kubernetes ConfigMap's) is a change."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


class Files:
    """Reads files, says what is wrong with them, and remembers what they were."""

    def __init__(self, collect: Collector) -> None:
        self._collect = collect
        self.marks: dict[Path, Mark] = {}

    def text(self, path: Path) -> str:
        self.marks[path] = mark(path)  # before it is read: what changes meanwhile is seen next time
        try:
            return path.read_text(encoding="utf-8-sig")
        except OSError as error:
            self._collect.add(str(path), str(path), f"cannot be read: {error.strerror or type(error).__name__}")
        except ValueError:  # not UTF-8, or a path with a NUL
            self._collect.add(str(path), str(path), "cannot be read: it is not UTF-8 text")
        return ""

    def toml(self, path: Path) -> dict[str, Any]:
        try:
            return tomllib.loads(self.text(path))
        except tomllib.TOMLDecodeError as error:
            self._collect.add(str(path), str(path), f"is not TOML: {error}")
        except (ValueError, RecursionError):
            self._collect.add(str(path), str(path), "is not usable TOML: a number too long, or nested too deep")
        return {}

    def array(self, path: Path, key: str) -> list[Any] | None:
        """The array in a JSON file, which may also stand below `key` there, as it must in TOML (by its suffix).

        None, and a problem, if there is none.
        """
        problems = len(self._collect.problems)
        document: Any
        if path.suffix == ".toml":
            document = self.toml(path)
        else:
            document = self._json(path)
        if len(self._collect.problems) > problems:
            return None
        if isinstance(document, dict):
            if len(document) == 1 and key in document:
                document = document[key]
            else:
                self._collect.add(str(path), str(path), f"must hold `{key}` and nothing else")
                return None
        if not isinstance(document, list):
            self._collect.add(str(path), str(path), "must hold an array")
            return None
        return document

    def _json(self, path: Path) -> Any:
        problems = len(self._collect.problems)
        text = self.text(path)
        if len(self._collect.problems) > problems:
            return None
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            self._collect.add(str(path), str(path), f"is not JSON: {error.msg.partition(':')[0]} at {where}")
        return None
