"""Where values come from: four layers of raw values, each with the place it was found; then `load`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from gateway.config import parsing
from gateway.config.files import Files
from gateway.config.model import Config, ConfigError, Secret
from gateway.config.parsing import Collector, Refused
from gateway.config.providers import Reader, native_root
from gateway.config.settings import BY_FIELD, BY_VARIABLE, CONFIG_VARIABLE, SETTINGS, Setting

_PREFIX: Final = "GATEWAY_"
_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_KEY_MIN_CHARS: Final = 16
_KEY_MAX_CHARS: Final = 512
#: what Kubernetes and Docker links append to a service's name, in variables that they set in every container
_SERVICE_LINK = re.compile(
    r"_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
)
#: beginnings of names that are ours, though not ours alone: an unknown one is worth a warning
_OUR_BEGINNINGS: Final = ("OPENAI_COMPATIBLE", "LOCAL_LLM_", "OLLAMA_BASE")


@dataclass(frozen=True, slots=True)
class Given:
    """A raw value: `path` names it in problems, `source` is where to look, `origin` is what `check` shows."""

    raw: Any
    path: str
    source: str
    origin: str


Layer = dict[str, Given]


def load(
    environ: Mapping[str, str],
    *,
    env_file: Path | None = None,
    toml_file: Path | None = None,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """The effective configuration, or `ConfigError` with every problem in every source.

    `flags` maps field names of `Config` to text from the command line. `toml_file` overrides
    `GATEWAY_CONFIG`. An empty variable counts as not set. Reads files, opens nothing else and changes
    nothing.
    """
    collect = Collector()
    files = Files(collect)
    dotenv = _read_env_file(env_file, files, collect) if env_file is not None else {}
    file_values = {name: value for name, (value, _) in dotenv.items()}
    variables = {**file_values, **{name: text for name, text in environ.items() if text.strip()}}
    if toml_file is None and variables.get(CONFIG_VARIABLE, "").strip():
        toml_file = Path(variables[CONFIG_VARIABLE])
    layers = (
        {
            field: Given(text, BY_FIELD[field].option, "command line", BY_FIELD[field].option)
            for field, text in (flags or {}).items()
        },
        _variables(environ, lambda name: "environment", lambda name: f"environment {name}"),
        _variables(file_values, *(2 * (lambda name: f"{env_file}:{dotenv[name][1]}",))),
        _read_toml(toml_file, files, collect) if toml_file is not None else {},
    )
    _unknown_variables(environ, lambda name: "environment", collect)
    _unknown_variables(file_values, lambda name: f"{env_file}:{dotenv[name][1]}", collect)
    config = _assemble(layers, variables, files, collect)
    if collect.problems:
        raise ConfigError(tuple(collect.problems), files.marks)
    return config


def _assemble(layers: tuple[Layer, ...], variables: Mapping[str, str], files: Files, collect: Collector) -> Config:
    reader = Reader(collect, variables, files)
    values: dict[str, Any] = {"data_dir": default_data_dir(variables)}
    given: Layer = {}
    for setting in SETTINGS:
        found = [layer[setting.field] for layer in layers if setting.field in layer]
        reader.origins[setting.field] = found[0].origin if found else "default"
        if not found:
            continue
        top = given[setting.field] = found[0]
        if len(found) > 1 and setting.field in ("providers", "api_keys"):
            others = " and ".join(other.origin for other in found[1:])
            collect.warn(top.path, top.source, f"replaces all of {others}", hint="the two are not merged")
        for other in found[1:]:
            _look_at_unused(setting, other, variables, collect)
        try:
            values[setting.field] = setting.parse(top.raw)
        except Refused as refused:
            collect.refuse(top.path, top.source, refused, top.raw)
    if "api_keys" in given:
        values["api_keys"] = _api_keys(given["api_keys"], reader)
    if "providers" in given:
        values["providers"] = _providers(given["providers"], reader)
    file = values.get("providers_file")
    if file is not None:
        further = files.array(file, "providers")
        if further is not None:
            before = values.get("providers", ())
            values["providers"] = reader.providers(further, str(file), str(file), str(file), before)
    root = values.get("ollama_base_url")
    if root is not None:
        values["ollama_base_url"] = root = native_root(root)
        at = given["ollama_base_url"]
        values["providers"] = reader.ollama(root, values.get("providers", ()), at.path, at.source, at.origin)
    reader.check_fallbacks(values.get("providers", ()))
    _across(values, given, collect)
    known = {field.name for field in fields(Config)}
    usable = {name: value for name, value in values.items() if name in known}
    return Config(**usable, warnings=tuple(collect.warnings), origins=reader.origins, files=files.marks)


def _look_at_unused(setting: Setting, given: Given, variables: Mapping[str, str], collect: Collector) -> None:
    """Tell what is wrong with a value that another replaces: it stops nothing now, and would when that one goes."""
    found = Collector()
    try:
        setting.parse(given.raw)
    except Refused as refused:
        found.refuse(given.path, given.source, refused, given.raw)
    reader = Reader(found, variables, Files(found))
    if setting.field == "providers":
        _providers(given, reader)
    elif setting.field == "api_keys":
        _api_keys(given, reader)
    for problem in found.problems:
        hint = f"{problem.hint}; not used now" if problem.hint else "not used now"
        collect.warnings.append(replace(problem, hint=hint))


def _across(values: dict[str, Any], given: Layer, collect: Collector) -> None:
    """What is wrong only together."""
    defaults = {field.name: field.default for field in fields(Config)}
    listen = values.get("listen", defaults["listen"])
    metrics = values.get("metrics_listen", defaults["metrics_listen"])
    if metrics is not None and listen == metrics and listen.port != 0:
        at = given.get("metrics_listen") or given["listen"]
        collect.add(at.path, at.source, f"listen and metrics_listen are both {listen}")
    if values.get("redis_url") and values.get("store", "auto") != "auto":
        at = given["redis_url"]
        collect.warn(at.path, at.source, f"is not used: store is {values['store']}", hint="store: auto")
    if values.get("oidc_issuer"):
        at = given["oidc_issuer"]
        if not values.get("oidc_audience"):
            hint = "GATEWAY_OIDC_AUDIENCE"
            collect.add(at.path, at.source, "needs an audience: its tokens for others must not open this", hint=hint)
        if importlib.util.find_spec("joserfc") is None:
            collect.add(at.path, at.source, "needs joserfc", hint="pip install local-llm-gateway[oidc]")
    if values.get("upstream_idle_s", 0.0) >= 5.0:
        at = given["upstream_idle_s"]
        collect.warn(
            at.path,
            at.source,
            "uvicorn and llama.cpp close connections that were idle for 5 s",
            hint="use less",
        )


def _providers(given: Given, reader: Reader) -> Any:
    raw = given.raw
    if isinstance(raw, str):
        try:
            raw = json.loads(raw, object_pairs_hook=_distinct, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            reader.collect.add(given.path, given.source, f"is not JSON: {error.msg} at {where}")
            return ()
        except Refused as refused:
            reader.collect.add(given.path, given.source, refused.message)
            return ()
        except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
            reader.collect.add(given.path, given.source, "is not usable JSON: a number too long, or nested too deep")
            return ()
    return reader.providers(raw, given.path, given.source, given.origin)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f"has the key {parsing.show(twice)} twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise Refused(f"is not JSON: {text} is no number")


def _api_keys(given: Given, reader: Reader) -> tuple[tuple[str, Secret], ...]:
    """Pairs of name and key. Problems name an entry by its number: the text around a mistake may be a key."""
    collect = reader.collect
    if isinstance(given.raw, str):
        pairs: list[tuple[Any, Any]] = []
        for number, part in enumerate(given.raw.split(","), 1):
            name, equals, key = part.partition("=")
            if equals:
                pairs.append((name, key))
            else:
                collect.add(f"{given.path} entry {number}", given.source, "must be name=key")
    elif isinstance(given.raw, dict):
        pairs = list(given.raw.items())
    else:
        collect.refuse(given.path, given.source, Refused("must be name=key pairs", shown=""))
        return ()
    keys: list[tuple[str, Secret]] = []
    for number, (name, raw) in enumerate(pairs, 1):
        path = f"{given.path} entry {number}"
        try:
            secret = _api_key(name, raw, reader)
            if name in (other for other, _ in keys):
                raise Refused("its name is already taken by an earlier entry")
            if any(secret == other for _, other in keys):
                raise Refused("its key is already that of an earlier entry")
            keys.append((name, secret))
        except Refused as refused:
            collect.add(path, given.source, refused.message, hint=refused.hint, nearest=refused.nearest)
    return tuple(keys)


def _api_key(name: str, raw: object, reader: Reader) -> Secret:
    from gateway.identity.keys import generated, intact  # here: only needed if there are keys at all

    if name != name.strip() or (isinstance(raw, str) and raw != raw.strip()):
        raise Refused("its name or its key begins or ends with a space")
    if not _KEY_NAME.fullmatch(name):
        raise Refused("its name must be 1 to 64 of A-Z a-z 0-9 _ . -")
    key = reader.secret(raw)
    if len(key.value) < _KEY_MIN_CHARS:
        swapped = "are name and key swapped?" if len(name) >= _KEY_MIN_CHARS else ""
        raise Refused(f"its key must have at least {_KEY_MIN_CHARS} characters", hint=swapped)
    if len(key.value) > _KEY_MAX_CHARS:
        raise Refused(f"its key must have at most {_KEY_MAX_CHARS} characters")
    if generated(key.value.encode()) and not intact(key.value.encode()):
        raise Refused("its key is a generated one with a wrong checksum", hint="a character was lost or changed")
    return key


def _variables(variables: Mapping[str, str], source: Callable[[str], str], origin: Callable[[str], str]) -> Layer:
    return {
        setting.field: Given(
            text if setting.field == "api_keys" else text.strip(),
            setting.variable,
            source(setting.variable),
            origin(setting.variable),
        )
        for setting in SETTINGS
        if (text := variables.get(setting.variable, "")).strip()
    }


def _unknown_variables(variables: Mapping[str, str], source: Callable[[str], str], collect: Collector) -> None:
    known = (*BY_VARIABLE, CONFIG_VARIABLE)
    ours = {name.removeprefix(_PREFIX): name for name in known}  # the common beginning would make all names near
    services = [name.removesuffix("_SERVICE_HOST") for name in variables if name.endswith("_SERVICE_HOST")]
    for name in sorted(variables):
        if name in known or not name.isprintable():
            continue
        near = ours.get(parsing.nearest(name.removeprefix(_PREFIX), ours), "")
        if name.startswith(_PREFIX):
            if not any(name.startswith(s) and _SERVICE_LINK.fullmatch(name[len(s) :]) for s in services):
                collect.add(name, source(name), "unknown variable", nearest=near)
        elif name.startswith(_OUR_BEGINNINGS):
            collect.warn(name, source(name), "unknown variable", nearest=near)


def _read_env_file(path: Path, files: Files, collect: Collector) -> dict[str, tuple[str, int]]:
    """Name -> (text, line) of the variables that are set. Nothing in the file is expanded: a `$` is a `$`."""
    from dotenv.parser import parse_stream

    text = files.text(path)
    found: dict[str, tuple[str, int]] = {}
    for binding in parse_stream(io.StringIO(text)):
        line = binding.original.line + len(binding.original.string) - len(binding.original.string.lstrip("\r\n"))
        if binding.error:
            message = "cannot be read as NAME=value"
            collect.add(f"{path}:{line}", str(path), message, hint="quote a value of several lines with '")
        elif binding.key is not None and binding.value is not None and binding.value.strip():
            found[binding.key] = (binding.value, line)
    return found


def _read_toml(path: Path, files: Files, collect: Collector) -> Layer:
    layer: Layer = {}
    for key, raw in files.toml(path).items():
        if key in BY_FIELD:
            layer[key] = Given(raw, key, str(path), f"{path}:{key}")
        else:
            near = BY_VARIABLE[key].field if key in BY_VARIABLE else parsing.nearest(key, BY_FIELD)
            shown = key if key.isprintable() and len(key) <= 60 else "…"
            collect.add(shown, str(path), "unknown key", nearest=near)
    return layer


def default_data_dir(variables: Mapping[str, str]) -> Path:
    """`$XDG_DATA_HOME/local-llm-gateway`, else in `~/.local/share` (XDG Base Directory Specification)."""
    base = variables.get("XDG_DATA_HOME", "")
    if not base.startswith("/"):  # the specification: a relative path is to be ignored
        home = variables.get("HOME") or os.path.expanduser("~")
        base = os.path.join(home, ".local", "share")
    return Path(base, "local-llm-gateway")
