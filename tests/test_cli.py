"""The command line as a user meets it: real processes, their output and exit codes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import gateway

CANARY = "canary7Q4mZ1xW8vT2sR5pK9nJ3hG6fD0"


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(gateway.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "gateway", *arguments],
        cwd=tmp_path,
        env=environ | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )


def test_version(tmp_path: Path) -> None:
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"llm-gateway {gateway.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("chek",), ("check", "--lisen", ":1")])
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage: llm-gateway" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_shows_what_the_command_takes_and_not_every_setting(tmp_path: Path) -> None:
    done = run(tmp_path, "upstreams", "drain", COLUMNS="120")
    assert done.returncode == 2
    usage, error = done.stderr.splitlines()
    assert usage.endswith("[--wait] [--timeout S] NAME")
    assert "--listen" not in usage
    assert error == "llm-gateway upstreams drain: error: the following arguments are required: NAME"
    assert "--listen" in run(tmp_path, "upstreams", "drain", "--help").stdout


def test_check_shows_the_effective_configuration(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GATEWAY_DEMO=off\n")
    done = run(tmp_path, "check", "--listen", "[::1]:9", GATEWAY_LOG_LEVEL="debug")
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert table["listen"] == ["[::1]:9", "--listen"]
    assert table["log_level"] == ["debug", "environment", "GATEWAY_LOG_LEVEL"]
    assert table["demo"] == ["off", ".env:1"]
    assert table["access_log"] == ["true", "default"]
    assert not (tmp_path / ".local").exists()  # it looks, it makes nothing


def test_check_as_json(tmp_path: Path) -> None:
    done = run(tmp_path, "check", "--json", GATEWAY_API_KEYS=f"a={CANARY}")
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert {"path": "api_keys.a", "value": "…6fD0", "origin": "environment GATEWAY_API_KEYS"} in data["rows"]


def test_check_prints_every_problem_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text("lisen = 1\n")
    entry = {"provider": "p", "baseUrl": "h", "apiKey": [CANARY], "apikey": CANARY, "runtime": "olama"}
    variables = {
        "GATEWAY_API_KEYS": f"{CANARY},a=x",
        "OPENAI_COMPATIBLE_DATA": json.dumps([entry]),
        "GATEWAY_LISTEN": "70000",
    }
    done = run(tmp_path, "check", "--config", "g.toml", **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "8 problems in the configuration:"
    assert len(lines) == 9
    assert "did you mean ollama?" in done.stderr
    assert "  lisen: unknown key; did you mean listen? [g.toml]" in lines
    as_json = run(tmp_path, "check", "--json", "--config", "g.toml", **variables)
    assert as_json.returncode == 2
    assert len(json.loads(as_json.stdout)["problems"]) == 8
    for text in (done.stderr, as_json.stdout, as_json.stderr):
        assert CANARY[:10] not in text


def test_a_file_named_on_the_command_line_must_exist(tmp_path: Path) -> None:
    done = run(tmp_path, "check", "--env-file", "none.env")
    assert done.returncode == 2
    assert "none.env: cannot be read: No such file" in done.stderr


def test_text_that_the_terminal_cannot_show_does_not_end_the_program(tmp_path: Path) -> None:
    done = run(tmp_path, "check", PYTHONIOENCODING="ascii", GATEWAY_API_KEYS=f"a={CANARY}")
    assert done.returncode == 0
    assert "\\u20266fD0" in done.stdout


def test_a_reader_that_leaves_early_is_no_failure(tmp_path: Path) -> None:
    """`llm-gateway check | head -1`: no traceback."""
    environ = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(gateway.__file__).parents[1])}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "check"], cwd=tmp_path, env=environ, stdout=writing, stderr=subprocess.PIPE,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_imports_no_server(tmp_path: Path) -> None:
    """`check` must start at once; the heavy rooms belong to `serve`."""
    code = "import sys; from gateway.cli import main; main(['check']); print(sorted(sys.modules), file=sys.stderr)"
    environ = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(gateway.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert "'gateway.config'" in done.stderr
    for heavy in ("'aiohttp'", "'asyncio'", "'prometheus_client'", "'gateway.sim'"):
        assert heavy not in done.stderr


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why a start failed; only log lines may stand before it."""
    assert done.returncode == 1, done.stderr
    *logged, line = done.stderr.splitlines()
    assert line.startswith("llm-gateway: ")
    assert all(re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING) ", other) for other in logged)
    return line


def test_serve_with_a_wrong_configuration(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--demo", "perhaps")
    assert done.returncode == 2
    assert "--demo = 'perhaps': must be one of auto, on, off [command line]" in done.stderr


def test_serve_with_a_data_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = one_line(run(tmp_path, "serve", "--data-dir", "file/data"))
    assert "the data directory file/data cannot be used: Not a directory" in line


def test_serve_with_a_key_file_that_others_may_read(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_bytes(bytes(32))
    (tmp_path / "pepper").chmod(0o644)
    assert "chmod 600" in one_line(run(tmp_path, "serve", "--data-dir", "."))


def test_serve_with_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ("--listen", f"127.0.0.1:{port}", "--metrics-listen", "off", "--demo", "on")
        done = run(tmp_path, "serve", *flags, GATEWAY_API_KEYS=f"a={CANARY}")
    line = one_line(done)
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


def test_sim_has_its_own_flags(tmp_path: Path) -> None:
    done = run(tmp_path, "sim", "serve", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: llm-gateway sim serve" in done.stdout
