"""`llm-gateway upstreams list | drain | resume`: asks the admin API of a gateway that runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

OK, FAILED, WRONG = 0, 1, 2

KEY_VARIABLE: Final = "LLM_GATEWAY_KEY"
LOOK_EVERY_S: Final = 0.25
TIMEOUT_S: Final = 10.0
_PATH: Final = "/admin/api/upstreams"

Common = Callable[[argparse.ArgumentParser], None]


class Failure(Exception):
    """What cannot be done, in words; `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def add_commands(parser: argparse.ArgumentParser, common: Common) -> None:
    """The sub-commands of `upstreams`; `common` adds what all take. Each sets `work`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, work: Callable[[argparse.Namespace, Gateway], int], about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print one JSON document with `rows`")
        one.add_argument("--url", metavar="URL", help="the gateway's address (default: the configured one, here)")
        one.add_argument("--key", metavar="KEY", help=f"a key with the role admin ({KEY_VARIABLE})")
        common(one)
        one.set_defaults(work=work)
        return one

    command("list", _list, "every upstream: health, load, models, and whether it gets requests")
    drain = command("drain", _drain, "give an upstream no new request; those that run on it end")
    drain.add_argument("name", metavar="NAME", help="as `list` shows it")
    drain.add_argument("--wait", action="store_true", help="return when no request of this gateway runs on it")
    drain.add_argument("--timeout", metavar="S", type=float, default=600.0, help="longest wait (default 600)")
    command("resume", _resume, "give an upstream requests again").add_argument("name", metavar="NAME")


def run(args: argparse.Namespace, url: str, environ: Mapping[str, str]) -> int:
    """Do what the arguments say; the exit code. `url`: the configured gateway's."""
    key = args.key or environ.get(KEY_VARIABLE, "")
    if not key and environ.get("OPENAI_API_KEY", "").startswith("llmgw_"):  # what the greeting says to export
        key = environ["OPENAI_API_KEY"]
    try:
        if not key:
            raise Failure(f"a key with the role admin is needed: set {KEY_VARIABLE}, or use --key", WRONG)
        code: int = args.work(args, Gateway((args.url or url).rstrip("/").removesuffix("/v1"), key))
        return code
    except Failure as failure:
        print(f"llm-gateway: {failure}", file=sys.stderr)
        return failure.code


class Gateway:
    """The admin API of a running gateway."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._key = key
        # No proxy of the environment: the key is for this gateway alone.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect()).open

    def ask(self, method: str, path: str = "") -> Any:
        """The answer's JSON. Raises Failure."""
        request = urllib.request.Request(  # noqa: S310  # the operator's own URL
            self.url + _PATH + path,
            method=method,
            headers={"Authorization": f"Bearer {self._key}"},
            data=b"" if method == "POST" else None,
        )
        try:
            with self._open(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failure(_words(error), WRONG if error.code < 500 else FAILED) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Failure(f"no gateway answers at {self.url}: {getattr(reason, 'strerror', None) or reason}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _words(error: urllib.error.HTTPError) -> str:
    try:
        message: str = json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"the gateway answered {error.code}"
    return message


def _list(args: argparse.Namespace, gateway: Gateway) -> int:
    _show(args, gateway.ask("GET")["rows"])
    return OK


def _drain(args: argparse.Namespace, gateway: Gateway) -> int:
    path = "/" + quote(args.name, safe="")
    row = gateway.ask("POST", f"{path}/drain")
    deadline_at = time.monotonic() + args.timeout
    while args.wait and row["in_flight"]:
        if time.monotonic() > deadline_at:
            raise Failure(f"after {args.timeout:g} s {row['in_flight']} requests still run on {row['name']}")
        time.sleep(LOOK_EVERY_S)
        row = gateway.ask("GET", path)
    _show(args, [row])
    return OK


def _resume(args: argparse.Namespace, gateway: Gateway) -> int:
    _show(args, [gateway.ask("POST", f"/{quote(args.name, safe='')}/resume")])
    return OK


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        print(json.dumps({"rows": rows}, indent=2, ensure_ascii=False))
        return
    table = [("name", "state", "health", "breaker", "in flight", "url", "models")]
    for row in rows:
        most = "" if row["max_in_flight"] is None else f"/{row['max_in_flight']}"
        health = row["health"]["status"] + (f" ({row['health']['reason']})" if row["health"]["reason"] else "")
        models = ", ".join(row["models"])
        table.append(
            (row["name"], row["state"], health, row["breaker"], f"{row['in_flight']}{most}", row["url"], models)
        )
    widths = [min(60, max(len(line[column]) for line in table)) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
