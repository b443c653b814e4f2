"""The greeting: what stands in it can be pasted into a shell as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gateway.catalog import Catalog
from gateway.config import Config, Listen, Model, Provider
from gateway.welcome import Furnished, greeting

PROVIDER = Provider("here", ("http://127.0.0.1:9/v1",), models=(Model("qwen3", "Qwen3"),))


@pytest.mark.parametrize(("in_path", "called"), [(False, ".venv/bin/llm-gateway"), (True, "llm-gateway")])
def test_the_program_is_named_as_the_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_path: bool, called: str
) -> None:
    program = tmp_path / "llm-gateway"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path if in_path else tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "argv", [".venv/bin/llm-gateway", "serve"])
    config = Config(data_dir=tmp_path, providers=(PROVIDER,))
    text = greeting(Furnished(config), Catalog(config.providers), Listen("0.0.0.0", 8700), None, "llmgw_key")
    assert f"`{called} keys create NAME`" in text
    assert "curl -N http://127.0.0.1:8700/v1/chat/completions" in text
    assert '-d \'{"model": "qwen3", "stream": true' in text
