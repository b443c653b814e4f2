"""The command line: `llm-gateway COMMAND`; the commands are those of `_parser`.

Exit codes: 0 done, 1 could not run (port in use, data directory not writable), 2 wrong usage or configuration.
Rooms are imported by the command that needs them, so that `check` and `--help` start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import __version__

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.errors import GatewayError
    from gateway.identity.keys import KeyRing

OK, FAILED, WRONG = 0, 1, 2


class Ended(Exception):
    """Ends the command: what is said on stderr, in the program's name unless it was wrong usage, and its exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message if code == WRONG else f"llm-gateway: {message}")
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's arguments) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show "…" must not end the program
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments[0] if arguments else "")
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # here, and not at the exit, where it could be no more than a complaint
    except Ended as end:
        print(end, file=sys.stderr)
        return end.code
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser; of commands with a room of their own only `command` has its arguments."""
    parser = argparse.ArgumentParser(
        prog="llm-gateway", description="The edge proxy for local LLM runtimes.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"llm-gateway {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="run the gateway", allow_abbrev=False)
    _configuration_flags(serve)
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="validate and show the configuration", allow_abbrev=False)
    _configuration_flags(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    doctor = commands.add_parser("doctor", help="look at the store and this machine", allow_abbrev=False)
    _configuration_flags(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    keys = commands.add_parser("keys", help="make, show, rotate and revoke API keys", allow_abbrev=False)
    if command == "keys":
        from gateway.identity import cli as keys_cli

        keys_cli.add_commands(keys, _configuration_flags)
        keys.set_defaults(run=_keys)

    for name, about in (
        ("usage", "what was used, by key, model, day and more"),
        ("explain", "what became of one request"),
        ("reconcile", "compare the ledger with the engines' own counters"),
    ):
        reading = commands.add_parser(name, help=about, allow_abbrev=False)
        if command == name:
            from gateway.ledger import cli as ledger_cli

            {"usage": ledger_cli.add_usage, "explain": ledger_cli.add_explain, "reconcile": ledger_cli.add_reconcile}[
                name
            ](reading)
            _configuration_flags(reading)
            reading.set_defaults(run=_ledger)

    upstreams = commands.add_parser("upstreams", help="what stands behind a running gateway", allow_abbrev=False)
    if command == "upstreams":
        from gateway.fleet import cli as fleet_cli

        fleet_cli.add_commands(upstreams, _configuration_flags)
        upstreams.set_defaults(run=_upstreams)

    importing = commands.add_parser("import", help="read another gateway's configuration", allow_abbrev=False)
    if command == "import":
        from gateway.importers import cli as import_cli

        import_cli.add_arguments(importing)
        importing.set_defaults(run=lambda args: import_cli.run(args, os.environ))

    sim = commands.add_parser("sim", help="the engine simulator")
    if command == "sim":
        from gateway.sim import cli as sim_cli

        sim_cli.add_arguments(sim)
        sim.set_defaults(run=_sim)
    return parser


class _Help(argparse.HelpFormatter):
    """Help whose usage has a command's own arguments alone: those of the configuration are fifty, and listed below."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        from gateway.config.settings import BY_FIELD

        own = [
            action for action in actions if action.dest not in BY_FIELD and action.dest not in ("config", "env_file")
        ]
        super().add_usage(usage, own, groups, prefix)


def _configuration_flags(parser: argparse.ArgumentParser) -> None:
    from gateway.config.settings import SETTINGS

    parser.formatter_class = _Help
    group = parser.add_argument_group("configuration", "each flag overrides the variable named with it")
    group.add_argument("--config", metavar="FILE", type=Path, help="TOML file (GATEWAY_CONFIG)")
    group.add_argument("--env-file", metavar="FILE", type=Path, help="instead of .env in the working directory")
    for setting in SETTINGS:
        if setting.flag:
            text = f"{setting.about} ({setting.variable})".replace("%", "%%")
            group.add_argument(setting.option, dest=setting.field, metavar="VALUE", help=text)


def _load(args: argparse.Namespace) -> Config:
    from gateway.config import load
    from gateway.config.settings import SETTINGS

    if args.env_file is None and Path(".env").is_file():
        args.env_file = Path(".env")  # from now on: when it is read again, its absence is a mistake
    given = ((setting.field, getattr(args, setting.field)) for setting in SETTINGS if setting.flag)
    flags = {field: text for field, text in given if text is not None}
    return load(os.environ, env_file=args.env_file, toml_file=args.config, flags=flags)


def _config(args: argparse.Namespace) -> Config:
    """The configuration, or the end of the command with everything that is wrong with it."""
    from gateway.config import ConfigError
    from gateway.config.check import problems_text

    try:
        return _load(args)
    except ConfigError as error:
        raise Ended(problems_text(error.problems), WRONG) from error


def _key_ring(config: Config) -> KeyRing:
    """The keys in the data directory, or the end of the command."""
    from gateway.identity.keys import KeyFileError, KeyRing

    try:
        return KeyRing.open(config.data_dir, config.api_keys)
    except KeyFileError as error:
        raise Ended(str(error)) from error
    except OSError as error:
        raise Ended(f"the data directory {config.data_dir} cannot be used: {_reason(error)}") from error


def _check(args: argparse.Namespace) -> int:
    from gateway.config import ConfigError
    from gateway.config.check import effective_data, effective_text, problems_data, problems_text

    try:
        config = _load(args)
    except ConfigError as error:
        if args.json:
            print(json.dumps(problems_data(error.problems), indent=2, ensure_ascii=False))
        else:
            print(problems_text(error.problems), file=sys.stderr)
        return WRONG
    if args.json:
        print(json.dumps(effective_data(config), indent=2, ensure_ascii=False))
    else:
        print(effective_text(config))
    return OK


def _doctor(args: argparse.Namespace) -> int:
    from gateway import doctor

    config = _config(args)
    findings = doctor.run(config)
    if args.json:
        print(json.dumps({"rows": [asdict(one) for one in findings]}, indent=2, ensure_ascii=False))
    else:
        print(doctor.text(findings))
    return FAILED if any(one.status == "fail" for one in findings) else OK


def _serve(args: argparse.Namespace) -> int:
    from gateway.config.check import warnings_text
    from gateway.identity.keys import KeyFileError

    config = _config(args)
    if config.warnings:
        print(warnings_text(config.warnings), file=sys.stderr)
    keyring = _key_ring(config)

    from gateway.server import require_aiohttp, serve

    try:
        require_aiohttp()
    except RuntimeError as error:
        raise Ended(str(error)) from error
    try:
        return serve(config, keyring, announce=_announce, load=lambda: _load(args))
    except KeyFileError as error:
        raise Ended(str(error)) from error
    except OSError as error:
        raise Ended(_reason(error)) from error
    except KeyboardInterrupt:
        return 130


def _sim(args: argparse.Namespace) -> int:
    from gateway.server import new_event_loop
    from gateway.sim import cli as sim_cli

    return sim_cli.run(args, new_event_loop)


def _keys(args: argparse.Namespace) -> int:
    from gateway.identity import cli as keys_cli

    config = _config(args)
    keyring = _key_ring(config)
    if not config.redis_url or config.store != "auto":
        return keys_cli.run(args, keyring, lambda: nullcontext(None))
    from gateway.identity.shared import connected

    return keys_cli.run(args, keyring, lambda: connected(config.redis_url.value))


def _upstreams(args: argparse.Namespace) -> int:
    from gateway.config import Listen
    from gateway.fleet import cli as fleet_cli

    if args.url:
        return fleet_cli.run(args, args.url, os.environ)
    config = _config(args)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen.host, config.listen.host)
    return fleet_cli.run(args, f"http://{Listen(host, config.listen.port)}", os.environ)


def _ledger(args: argparse.Namespace) -> int:
    from gateway.ledger import cli as ledger_cli
    from gateway.store.client import Store

    config = _config(args)
    store = Store.open(config.store, config.redis_url.value, config.data_dir)
    try:
        return ledger_cli.run(args, config.data_dir, store, lambda: _engines(config))
    except OSError as error:
        raise Ended(_reason(error)) from error


async def _engines(config: Config) -> dict[str, str | GatewayError]:
    """The metrics page of every configured upstream, or what came instead."""
    from gateway.catalog import Catalog
    from gateway.errors import GatewayError, UpstreamError
    from gateway.upstreams.control import Control

    found: dict[str, str | GatewayError] = {}
    catalog = Catalog(config.providers)
    if catalog.lookups:
        from gateway.fleet.names import Names

        names = Names(catalog, lambda: None)
        await names.start(config.dns_refresh_s, config.dns_server)
        await names.stop()
    async with Control() as control:
        for upstream in catalog.upstreams:
            try:
                answer = await control.get(upstream.url("/metrics"), name=upstream.name, api_key=upstream.api_key)
            except GatewayError as error:
                found[upstream.name] = error
            else:
                page = answer.body.decode("utf-8", "replace")
                found[upstream.name] = page if answer.status == 200 else UpstreamError(answer.reason())
    return found


def _announce(text: str) -> None:
    print(text, flush=True)


def _reason(error: OSError) -> str:
    """What the system says, in one line; asyncio's own text for a port in use names the address."""
    if error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return error.strerror or str(error) or type(error).__name__
