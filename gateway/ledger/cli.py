"""`llm-gateway usage | explain | reconcile`: the ledger read from the data directory and the store, whether a gateway
runs or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from gateway.errors import GatewayError
from gateway.ledger.reconcile import Reading, Tokens, compare, engine_tokens
from gateway.ledger.report import BY, FORMATS, BadQuery, Window, parquet, render, usage
from gateway.ledger.story import explain, text
from gateway.ledger.totals import HOUR_S
from gateway.store.client import Store, StoreAway

OK, FAILED, WRONG = 0, 1, 2

#: the metrics pages of all engines by upstream: the text, or the error that came instead
Engines = Callable[[], Awaitable[dict[str, str | GatewayError]]]
SNAPSHOT: Final = "reconcile.json"


def add_usage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", default="model", metavar="NAMES", help=f"comma-separated, of {', '.join(BY)}")
    parser.add_argument("--since", default="7d", metavar="TIME", help="24h, 7d, 2w, or an ISO time (default 7d)")
    parser.add_argument("--until", default="", metavar="TIME", help="the same (default now)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="parquet needs the extra `parquet`")
    parser.add_argument("--json", action="store_true", help="print one JSON document with `rows`")
    parser.set_defaults(read=_usage)


def add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as in the answer's X-Request-Id")
    parser.add_argument("--json", action="store_true", help="print one JSON document with `rows`")
    parser.set_defaults(read=_explain)


def add_reconcile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restart", action="store_true", help="begin a new window after the comparison")
    parser.add_argument("--json", action="store_true", help="print one JSON document with `rows`")
    parser.set_defaults(read=_reconcile)


def run(args: argparse.Namespace, data_dir: Path, store: Store | None, engines: Engines) -> int:
    """Run the command; what it reads goes to stdout, what is wrong to stderr."""
    try:
        return asyncio.run(_run(args, data_dir, store, engines))
    except BadQuery as error:
        code, text = WRONG, str(error)
    except StoreAway as error:
        code, text = FAILED, f"{error}: the ledger cannot be read"
    except ValueError as error:  # a damaged file; it names it
        code, text = FAILED, str(error)
    except ImportError:
        code, text = FAILED, "parquet needs pyarrow: install local-llm-gateway[parquet]"
    sys.stderr.write(f"llm-gateway: {text}\n")
    return code


async def _run(args: argparse.Namespace, data_dir: Path, store: Store | None, engines: Engines) -> int:
    if store is not None:
        await store.start()
    try:
        code: int = await args.read(args, data_dir, store, engines)
        return code
    finally:
        if store is not None:
            await store.close()


async def _usage(args: argparse.Namespace, data_dir: Path, store: Store | None, _: Engines) -> int:
    window = Window.parse(args.by, args.since, args.until, datetime.now(UTC))
    rows = await usage(data_dir / "journal", store, window)
    if args.json:
        _json({**window.document(), "rows": rows})
    elif args.format == "parquet":
        if sys.stdout.isatty():
            raise BadQuery("parquet is no text for a terminal: write it to a file, `> usage.parquet`")
        sys.stdout.buffer.write(parquet(rows, window.by))
    else:
        sys.stdout.write(render(rows, args.format))
    return OK


async def _explain(args: argparse.Namespace, data_dir: Path, store: Store | None, _: Engines) -> int:
    story = await explain(data_dir / "journal", store, args.request_id)
    if args.json:
        _json({"rows": [] if story is None else [story]})
    elif story is not None:
        sys.stdout.write(text(story))
    if story is None:
        sys.stderr.write("llm-gateway: the ledger knows no such request\n")
        return FAILED
    return OK


async def _reconcile(args: argparse.Namespace, data_dir: Path, store: Store | None, engines: Engines) -> int:
    path = data_dir / SNAPSHOT
    before = _kept(path)
    now_s = time.time()
    since = before.since if before is not None else int(now_s) // HOUR_S * HOUR_S
    pages = await engines()
    sums = await usage(data_dir / "journal", store, Window(("upstream",), since, int(now_s) + 1))
    read, trouble = _engines(pages)
    mine = {row["upstream"]: Tokens(row["input_tokens"], row["output_tokens"]) for row in sums if row["upstream"]}
    now = Reading(now_s, since, mine, read)
    if before is None:
        _keep(path, now)
        sys.stderr.write("llm-gateway: a first reading was kept; run this again to compare what is added from now on\n")
        rows = []
    else:
        rows = compare(before, now, trouble)
        if args.restart:
            _keep(path, await _anew(data_dir, store, now))
    if args.json:
        _json({"since": datetime.fromtimestamp((before or now).at, UTC).isoformat(), "rows": rows})
    elif rows:
        sys.stdout.write(render(rows, "table"))
    return OK


async def _anew(data_dir: Path, store: Store | None, now: Reading) -> Reading:
    """The same reading, its sums counted from the hour that runs now, so that they stay short."""
    since = int(now.at) // HOUR_S * HOUR_S
    sums = await usage(data_dir / "journal", store, Window(("upstream",), since, int(now.at) + 1))
    mine = {row["upstream"]: Tokens(row["input_tokens"], row["output_tokens"]) for row in sums if row["upstream"]}
    return Reading(now.at, since, mine, now.engines)


def _engines(pages: dict[str, str | GatewayError]) -> tuple[dict[str, Tokens], dict[str, str]]:
    read: dict[str, Tokens] = {}
    trouble: dict[str, str] = {}
    for name, page in pages.items():
        if isinstance(page, GatewayError):
            trouble[name] = page.message
        elif (tokens := engine_tokens(page)) is not None:
            read[name] = tokens
        else:
            trouble[name] = "its metrics page has no token counters that are known here"
    return read, trouble


def _kept(path: Path) -> Reading | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Reading)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        sys.stderr.write(f"llm-gateway: {path} cannot be understood; a new reading takes its place\n")
        return None


def _keep(path: Path, reading: Reading) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(reading))
    draft.replace(path)


def _json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
