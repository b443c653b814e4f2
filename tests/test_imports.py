"""The import rules of `gateway/__init__.py`, checked on the syntax tree; and that each module can be imported alone.

A room is what stands directly below `gateway` ("wire", "catalog"), or "middleware". Imports under
`if TYPE_CHECKING:` bind nothing when the program runs, and are free.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ANY = frozenset({"*"})
#: room -> the rooms it may import besides itself and the package's own `__init__` (the version)
ROOMS: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "wire": frozenset({"errors"}),
    "dialects": frozenset({"wire", "errors"}),
    "continuation": frozenset({"wire", "errors"}),
    "exchange": frozenset({"wire", "errors"}),
    "routing": frozenset({"errors"}),
    "queueing": frozenset(),
    "runtimes": frozenset({"wire", "dialects", "errors"}),
    "metrics": frozenset({"queueing", "routing", "exchange", "errors", "ledger", "upstreams"}),
    "log": frozenset({"exchange", "errors", "ledger"}),
    "store": frozenset({"errors", "metrics"}),
    "limits": frozenset({"store", "exchange", "errors"}),
    "identity": frozenset({"store", "limits", "queueing", "errors"}),
    "oidc": frozenset({"identity", "limits", "errors"}),
    "ledger": frozenset({"store", "wire", "errors", "exchange"}),
    "upstreams": frozenset({"routing", "runtimes", "wire", "errors", "metrics"}),
    "config": frozenset({"routing", "runtimes", "upstreams", "identity", "limits", "oidc", "store", "errors"}),
    "catalog": frozenset({"routing", "config", "upstreams", "runtimes", "errors"}),
    "importers": frozenset({"config"}),
    "fleet": frozenset({"catalog", "config", "errors", "store", "upstreams"}),
    "detect": frozenset({"upstreams", "runtimes", "errors"}),
    "sim": frozenset({"routing", "wire", "errors"}),
    "answer": frozenset({"exchange", "errors"}),
    "router": frozenset({"answer", "exchange", "errors", "middleware"}),
    "dispatch": frozenset(
        {"catalog", "errors", "exchange", "metrics", "queueing", "routing", "runtimes", "upstreams", "wire"}
    ),
    "passage": frozenset(
        {
            "answer",
            "catalog",
            "continuation",
            "dispatch",
            "errors",
            "exchange",
            "ledger",
            "runtimes",
            "upstreams",
            "wire",
        }
    ),
    "handlers": frozenset(
        {"answer", "catalog", "config", "errors", "exchange", "metrics", "passage", "runtimes", "upstreams", "wire"}
    ),
    "admin": frozenset(
        {
            "answer",
            "catalog",
            "config",
            "dispatch",
            "exchange",
            "fleet",
            "passage",
            "identity",
            "ledger",
            "limits",
            "metrics",
            "store",
            "upstreams",
            "errors",
        }
    ),
    "middleware": frozenset(
        {"answer", "exchange", "errors", "limits", "identity", "oidc", "metrics", "ledger", "log", "wire"}
    ),
    "app": ANY,
    "welcome": frozenset({"catalog", "config", "detect", "identity", "upstreams", "runtimes", "sim", "errors"}),
    "server": frozenset({"app", "answer", "config", "fleet", "identity", "log", "errors", "welcome"}),
    "cli": frozenset(
        {
            "app",
            "server",
            "config",
            "fleet",
            "doctor",
            "errors",
            "identity",
            "detect",
            "catalog",
            "ledger",
            "sim",
            "log",
        }
        | {"importers", "store", "upstreams"}
    ),
    "doctor": frozenset({"config", "oidc", "server", "store", "upstreams", "errors"}),
    "__main__": frozenset({"cli"}),
}

#: decide and translate, await nothing: of what is not the standard library, only these
PURE = (
    "errors",
    "exchange",
    "queueing",
    "routing",
    "wire",
    "dialects",
    "continuation",
    "runtimes",
    "limits.bucket",
    "limits.estimate",
    "limits.spec",
    "identity.fields",
    "identity.principals",
    "oidc.grants",
    "oidc.issuer",
    "upstreams.upstream",
    "ledger.prices",
    "store.address",
    "store.breaker",
    "store.scripts",
    "sim.engine",
    "sim.text",
)
PURE_LIBRARIES = {"orjson", "msgspec", "multidict", "xxhash"}
IMPURE_STANDARD = {"asyncio", "socket", "ssl", "selectors", "subprocess", "threading", "http", "urllib.request"}

#: one library, one door: top-level package -> the modules (or rooms) that may import it
DOORS = {
    "redis": ("store", "limits.redis"),
    "prometheus_client": ("metrics", "app"),
    "aiohttp_session": ("admin",),
    "httptools": ("upstreams.connection", "sim"),
    "uvloop": ("server", "cli"),
    "xxhash": ("routing.prefix",),
    "dotenv": ("config",),
    "dns": ("fleet.names",),
    "yaml": ("importers",),
    "joserfc": ("oidc",),
}

#: names whose use opens connections -> the modules that may use them; the simulator is a program of its own
OPENERS = {
    "ClientSession": ("upstreams.control",),
    "create_connection": ("upstreams.transport",),
    "open_connection": ("upstreams.transport",),
}


@dataclass(frozen=True)
class Import:
    module: str  # importer, without "gateway."
    target: str  # imported module, absolute
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def sources() -> dict[str, Path]:
    """Every module's name, "gateway." left out, and its file."""
    found = {}
    for top in ("gateway", "middleware"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts[1:] if top == "gateway" else parts)] = path
    return found


SOURCES = sources()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, without what only a type checker sees."""
    yield node
    if is_type_checking(node):
        assert isinstance(node, ast.If)
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from at_run_time(child)


def imports(module: str, tree: ast.Module, package: bool) -> Iterator[Import]:
    full = module if module.split(".")[0] == "middleware" else f"gateway.{module}".rstrip(".")
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = full.split(".")[: len(full.split(".")) - node.level + package]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:  # `from gateway import errors` imports gateway.errors
                inner = f"{base}.{alias.name}"
                name = inner.removeprefix("gateway.")
                yield Import(module, inner if name in SOURCES and inner != name else base, node.lineno)


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def breaches(module: str, source: str, package: bool = False) -> list[str]:
    tree = ast.parse(source)
    room = module.split(".")[0]
    found = []
    for imported in imports(module, tree, package):
        top = imported.target.split(".")[0]
        if top in ("gateway", "middleware"):
            other = "middleware" if top == "middleware" else imported.target.removeprefix("gateway").strip(".")
            other_room = other.split(".")[0]
            allowed = ROOMS.get(room, frozenset())
            if room == "" and other:
                found.append(f"{imported}: the package's own __init__ imports no room")
            elif other_room not in ("", room) and other_room not in allowed and allowed != ANY:
                found.append(f"{imported}: {room} may import {', '.join(sorted(allowed)) or 'no room'}")
            elif other_room == "admin" and room not in ("app", "admin"):
                found.append(f"{imported}: only app imports admin")
            elif within(module, PURE) and other and not within(other, PURE):
                found.append(f"{imported}: {module} is pure and {other} is not")
        elif within(module, PURE):
            known = top in sys.stdlib_module_names or top in PURE_LIBRARIES
            if not known or top in IMPURE_STANDARD or imported.target in IMPURE_STANDARD:
                found.append(f"{imported}: {module} is pure")
        if top in DOORS and not within(module, DOORS[top]):
            found.append(f"{imported}: {top} belongs to {', '.join(DOORS[top])}")
    if room != "sim":
        for node in at_run_time(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in OPENERS and not within(module, OPENERS[name]):
                found.append(f"{module}:{node.lineno} uses {name}: it belongs to {', '.join(OPENERS[name])}")  # type: ignore[attr-defined]
    return list(dict.fromkeys(found))  # `from x import a, b` breaks a rule once


@pytest.mark.parametrize("module", SOURCES)
def test_import_rules(module: str) -> None:
    path = SOURCES[module]
    assert module == "" or module.split(".")[0] in ROOMS, f"{module}: a new room needs a line in ROOMS"
    assert breaches(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("errors", "import asyncio", "pure"),
        ("wire.sse", "import aiohttp", "pure"),
        ("wire.sse", "def late():\n    from gateway import catalog", "may import"),
        ("exchange", "import urllib.request", "pure"),
        ("upstreams.upstream", "from gateway.upstreams.transport import Transport", "transport is not"),
        ("passage.relay", "import gateway.app", "may import"),
        ("passage.relay", "from ..admin import pages", "may import"),
        ("middleware.auth", "from gateway.passage.proxy import proxy", "may import"),
        ("passage.relay", "import aiohttp\naiohttp.ClientSession()", "uses ClientSession"),
        ("catalog", "import redis.asyncio", "redis belongs to"),
        ("metrics", "from prometheus_client import Counter", ""),
        ("wire.sse", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gateway.app import App", ""),
        ("upstreams.transport", "loop.create_connection()", ""),
        ("app", "from gateway.passage.proxy import proxy\nimport middleware", ""),
    ],
)
def test_the_rules_catch(module: str, source: str, breach: str) -> None:
    found = breaches(module, source)
    assert bool(found) == bool(breach)
    assert all(breach in one for one in found)


def test_each_module_can_be_imported_alone() -> None:
    """In any order: no module leans on another having been imported before it. Warnings are errors."""
    names = ["middleware" if n == "middleware" else n if n.startswith("middleware.") else f"gateway.{n}".rstrip(".")
             for n in SOURCES if n != "__main__"]  # fmt: skip
    program = f"""
        import importlib, sys, traceback
        failed = []
        for name in {names!r}:
            for loaded in [m for m in sys.modules if m.split(".")[0] in ("gateway", "middleware")]:
                del sys.modules[loaded]
            try:
                importlib.import_module(name)
            except Exception:
                failed.append(name + "\\n" + traceback.format_exc())
        sys.exit("\\n".join(failed) or 0)
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
