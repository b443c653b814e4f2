"""`llm-gateway keys create | list | show | rotate | revoke`, on the data directory and the store themselves: whether
a gateway runs or not. Those that run follow within seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import GatewayError
from gateway.identity import fields
from gateway.identity.book import KeyBook
from gateway.identity.keyfile import KeyFileError
from gateway.identity.keys import KeyRing
from gateway.identity.records import document

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from gateway.identity.shared import Shared

OK, FAILED, WRONG = 0, 1, 2

#: opens the store that hosts share, if there is one
Open = Callable[[], "AbstractAsyncContextManager[Shared | None]"]
Work = Callable[[argparse.Namespace, KeyBook], Awaitable[None]]

_COLUMNS: Final = ("id", "name", "status", "group", "roles", "models", "expires_at", "created_at")


def add_commands(parser: argparse.ArgumentParser, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """The sub-commands of `keys`; `common` adds what all take. Each sets `work`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, work: Work, about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print JSON")
        common(one)
        one.set_defaults(work=work)
        return one

    create = command("create", _create, "make a key; its text is printed once")
    create.add_argument("name", metavar="NAME", help="1 to 64 of A-Z a-z 0-9 _ . -")
    create.add_argument("--group", metavar="NAME", help="the group that owns it")
    create.add_argument("--role", metavar="ROLE", action="append", help="a role, such as admin; may be repeated")
    create.add_argument("--model", metavar="MODEL", action="append", help="a model it may use; all if none is named")
    create.add_argument(
        "--limit", metavar="JSON", action="append", help='{"resource": "requests", "burst": 60, "per_min": 60}'
    )
    create.add_argument("--budget", metavar="JSON", help='{"amount": 10, "unit": "currency", "period": "month"}')
    create.add_argument("--priority", metavar="CLASS", help="how its requests wait: high, normal or low")
    create.add_argument("--weight", metavar="NUMBER", type=float, help="its share of a full fleet; 1 if not said")
    create.add_argument("--expires", metavar="WHEN", help="30d, 12h, or 2027-01-31T00:00:00Z")
    create.add_argument("--metadata", metavar="KEY=TEXT", action="append", help="a note; may be repeated")

    command("list", _list, "all keys, without their texts")
    command("show", _show, "everything about a key but its text").add_argument(
        "id", metavar="ID", help="its id or name"
    )
    rotate = command("rotate", _rotate, "give a key another text; the one before stays valid for a while")
    rotate.add_argument("id", metavar="ID", help="its id or name")
    rotate.add_argument("--overlap", metavar="TIME", default="24h", help="how long; 0s ends it at once (default 24h)")
    revoke = command("revoke", _revoke, "end a key for good")
    revoke.add_argument("id", metavar="ID", help="its id or name")


def run(args: argparse.Namespace, ring: KeyRing, open_shared: Open) -> int:
    """Do what the arguments say; the exit code."""
    return asyncio.run(_run(args, ring, open_shared))


async def _run(args: argparse.Namespace, ring: KeyRing, open_shared: Open) -> int:
    try:
        async with open_shared() as shared:
            book = KeyBook(ring, shared)
            await book.sync()
            await args.work(args, book)
            if shared is not None and (trouble := shared.trouble):
                print(f"llm-gateway: {trouble}; other hosts learn of this when it is back", file=sys.stderr)
    except GatewayError as error:
        print(f"llm-gateway: {error.message}", file=sys.stderr)
        return WRONG
    except KeyFileError as error:
        print(f"llm-gateway: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"llm-gateway: {error.strerror or error}: {error.filename or ring.file.data_dir}", file=sys.stderr)
        return FAILED
    return OK


async def _create(args: argparse.Namespace, book: KeyBook) -> None:
    raw: dict[str, Any] = {"name": args.name}
    given = {"group": args.group, "roles": args.role, "models": args.model, "expires_at": args.expires}
    given |= {"priority": args.priority, "weight": args.weight}
    raw.update({name: value for name, value in given.items() if value is not None})
    if args.limit:
        raw["limits"] = [_parsed(text, "--limit") for text in args.limit]
    if args.budget:
        raw["budget"] = _parsed(args.budget, "--budget")
    if args.metadata:
        pairs = [text.partition("=") for text in args.metadata]
        if not all(equals for _, equals, _ in pairs):
            raise fields.refused("--metadata", "must be KEY=TEXT")
        raw["metadata"] = {key: value for key, _, value in pairs}
    key, record = await book.create(fields.read(raw, book.clock(), new=True))
    _print_key(args, key, document(record, book.clock()))


async def _list(args: argparse.Namespace, book: KeyBook) -> None:
    rows = book.rows()
    if args.json:
        print(json.dumps({"rows": rows}, indent=2, ensure_ascii=False))
    else:
        print(_table(rows))


async def _show(args: argparse.Namespace, book: KeyBook) -> None:
    row = _row(args.id, book)
    if args.json:
        print(json.dumps({"rows": [row]}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(f"{name:<21} {_cell(value)}" for name, value in _worded(row).items()))


async def _rotate(args: argparse.Namespace, book: KeyBook) -> None:
    overlap_s = fields.duration_s(args.overlap, "--overlap")
    key, record = await book.rotate(_row(args.id, book)["id"], overlap_s)
    _print_key(args, key, document(record, book.clock()))


async def _revoke(args: argparse.Namespace, book: KeyBook) -> None:
    record = await book.revoke(_row(args.id, book)["id"])
    if args.json:
        print(json.dumps(document(record, book.clock()), indent=2, ensure_ascii=False))
    else:
        print(f"The key {record.id} ({record.name}) is revoked. Running gateways refuse it within seconds.")


def _row(wanted: str, book: KeyBook) -> dict[str, Any]:
    """The key with this id, or the one with this name that is not revoked. Raises NotFound."""
    rows = book.rows()
    for row in rows:
        if row["id"] == wanted:
            return row
    named = [row for row in rows if row["name"] == wanted and row["status"] != "revoked"]
    return named[0] if named else document(book.find(wanted), time.time())


def _print_key(args: argparse.Namespace, key: str, row: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"key": key, **row}, indent=2, ensure_ascii=False))
        return
    print(f"The key {row['id']} ({row['name']}), shown only now (its hash is kept):\n\n    {key}\n")
    if row["previous_valid_until"] is not None:
        print(f"Its former text is valid until {row['previous_valid_until']}.")


def _parsed(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise fields.refused(flag, "must be JSON") from None


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [_COLUMNS, *(tuple(_cell(row[name]) for name in _COLUMNS) for row in map(_worded, rows))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _worded(row: dict[str, Any]) -> dict[str, Any]:
    return row if row["models"] is not None else {**row, "models": "all"}


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case str():
            return value or "-"
        case list() if all(isinstance(one, str) for one in value):
            return ",".join(value) or "-"
        case dict() | list():
            return json.dumps(value) if value else "-"
    return str(value)
