"""`llm-gateway import litellm FILE`: our TOML on stdout, and on stderr all that has no counterpart here."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from gateway.config import ConfigError, load
from gateway.importers.litellm import Importer

OK, FAILED, WRONG = 0, 1, 2

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="formats", metavar="FORMAT", required=True)
    litellm = kinds.add_parser("litellm", help="LiteLLM's proxy configuration (YAML)", allow_abbrev=False)
    litellm.add_argument("file", metavar="FILE", type=Path, help="its config.yaml")
    litellm.add_argument("--out", metavar="FILE", type=Path, help="write the TOML there; an existing file is kept")
    litellm.add_argument("--json", action="store_true", help="print one JSON document: `toml`, `rows` and `problems`")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Import; the exit code. FAILED where the result is not yet a valid configuration."""
    import yaml

    try:
        document = yaml.safe_load(args.file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return _wrong(f"{args.file} cannot be read: {_line(error)}")
    if not isinstance(document, dict) or "model_list" not in document:
        return _wrong(f"{args.file} is no configuration of LiteLLM: it has no `model_list`")
    result = Importer(environ).run(document)
    text = toml(result.document)
    problems = _problems(text, environ)
    if args.out is not None:
        try:
            # For the owner's eyes: it may hold keys.
            with open(os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            return _wrong(f"{args.out} cannot be written: {error.strerror}")
    if args.json:
        rows = [{"path": note.path, "message": note.message} for note in result.notes]
        print(json.dumps({"toml": text, "rows": rows, "problems": problems}, indent=2, ensure_ascii=False))
    else:
        if args.out is None:
            sys.stdout.write(text)
        _tell("not taken over as it was:", map(str, result.notes))
        _tell("still to be mended before it can be used:", problems)
    return FAILED if problems else OK


def toml(document: dict[str, Any]) -> str:
    """The configuration as text: plain values, tables, and `[[providers]]` with their models."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in document.items() if not isinstance(value, dict | list)]
    for key, value in document.items():
        if isinstance(value, dict):
            lines += ["", f"[{_key(key)}]", *(f"{_key(name)} = {_value(one)}" for name, one in value.items())]
    for provider in document.get("providers", ()):
        lines += ["", "[[providers]]"]
        lines += [f"{key} = {_value(value)}" for key, value in provider.items() if key != "models"]
        for model in provider.get("models", ()):
            lines += ["", "[[providers.models]]", *(f"{key} = {_value(value)}" for key, value in model.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
    # JSON's strings are TOML's, but for DEL, which TOML wants escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _problems(text: str, environ: Mapping[str, str]) -> list[str]:
    """What our own reader says of the result. Variables that are not set here may be set where it is used."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gateway.toml")
        file.write_text(text, encoding="utf-8")
        variables = {name: value for name, value in environ.items() if not name.startswith("GATEWAY_")}
        try:
            load(variables, toml_file=file)
        except ConfigError as error:
            return [str(problem) for problem in error.problems]
    return []


def _tell(heading: str, lines: Iterable[str]) -> None:
    found = list(lines)
    if found:
        print("\n".join([heading, *(f"  {line}" for line in found)]), file=sys.stderr)


def _wrong(message: str) -> int:
    print(f"llm-gateway: {message}", file=sys.stderr)
    return WRONG


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "strerror", None) or "it is not UTF-8 text"
    return f"line {mark.line + 1}: {what}" if mark is not None else str(what)
