"""LiteLLM's configuration becomes ours: what is taken over, what is named, and that the result serves."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gateway.config import load
from gateway.importers.cli import toml
from gateway.importers.litellm import Importer
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, chat, gateway

CONFIG: dict[str, Any] = {
    "model_list": [
        {
            "model_name": "qwen3",
            "litellm_params": {
                "model": "hosted_vllm/Qwen/Qwen3-32B",
                "api_base": "http://gpu1:8000/v1",
                "api_key": "os.environ/VLLM_KEY",
                "weight": 4,
                "timeout": 120,
                "stream_timeout": "30",
                "max_parallel_requests": 16,
            },
            "model_info": {
                "input_cost_per_token": 1e-7,
                "output_cost_per_token": 4e-7,
                "max_input_tokens": 32768,
                "supports_function_calling": False,
                "id": "x",
                "mode": "chat",
            },
        },
        {
            "model_name": "qwen3",
            "litellm_params": {"model": "ollama_chat/qwen3:32b", "api_base": "http://spare:11434", "weight": 2},
        },
        {"model_name": "small", "litellm_params": {"model": "openai/phi", "api_base": "http://cpu:8080/v1"}},
        {"model_name": "cloud", "litellm_params": {"model": "bedrock/claude", "aws_region_name": "x"}},
    ],
    "router_settings": {
        "fallbacks": [{"qwen3": ["small", "cloud"]}],
        "model_group_alias": {"gpt-4o": "qwen3", "mini": {"model": "small", "hidden": True}},
        "num_retries": 2,
        "routing_strategy": "least-busy",
        "redis_host": "r",
    },
    "litellm_settings": {"drop_params": True},
    "general_settings": {"master_key": "os.environ/MASTER"},
}


def imported(config: Any, **environ: str) -> tuple[dict[str, Any], dict[str, str]]:
    result = Importer(environ).run(json.loads(json.dumps(config)))
    return result.document, dict(result.notes)


def one(**params: Any) -> dict[str, Any]:
    return {"model_list": [{"model_name": "m", "litellm_params": params}]}


def test_what_is_taken_over(tmp_path: Path) -> None:
    document, notes = imported(CONFIG)
    file = tmp_path / "gateway.toml"
    file.write_text(toml(document))
    config = load({"HOME": "/x", "VLLM_KEY": "k" * 16, "MASTER": "m" * 20}, toml_file=file)
    vllm, ollama, other = config.providers
    assert (vllm.name, vllm.runtime, vllm.base_urls) == ("vllm-gpu1-8000", "vllm", ("http://gpu1:8000/v1",))
    assert (vllm.api_key.value, vllm.weight, vllm.max_in_flight) == ("k" * 16, 4, 16)
    assert (vllm.timeouts.first_byte_s, vllm.timeouts.idle_s) == (120.0, 30.0)
    (model,) = vllm.models
    assert (model.name, model.aliases, model.fallbacks) == ("Qwen/Qwen3-32B", ("qwen3", "gpt-4o"), ("small",))
    assert (model.context_window, model.supports_tools) == (32768, False)
    assert model.price is not None
    assert (model.price.input, model.price.output) == (0.1, 0.4)
    assert (ollama.runtime, ollama.base_urls, ollama.weight) == ("ollama", ("http://spare:11434/v1",), 2)
    assert (ollama.models[0].name, ollama.models[0].aliases) == ("qwen3:32b", ("qwen3", "gpt-4o"))
    assert (other.runtime, other.models[0].name, other.models[0].aliases) == ("", "phi", ("small", "mini"))
    assert config.attempts == 3
    assert [(name, key.value) for name, key in config.api_keys] == [("master", "m" * 20)]
    assert set(notes) == {
        "model_list[3].litellm_params.model",
        "model_list[3].litellm_params.aws_region_name",
        "router_settings.fallbacks[0].qwen3",
        "router_settings.model_group_alias.mini.hidden",
        "router_settings.routing_strategy",
        "router_settings.redis_host",
        "litellm_settings.drop_params",
        "general_settings.master_key",
    }
    assert "REDIS_URL" in notes["router_settings.redis_host"]
    assert "'cloud'" in notes["router_settings.fallbacks[0].qwen3"]


@pytest.mark.parametrize(
    ("params", "runtime", "url", "name"),
    [
        ({"model": "openai/gpt-x"}, "", "https://api.openai.com/v1", "gpt-x"),
        ({"model": "gpt-x"}, "", "https://api.openai.com/v1", "gpt-x"),
        ({"model": "ollama/llama3"}, "ollama", "http://localhost:11434/v1", "llama3"),
        ({"model": "ollama/llama3", "api_base": "http://h:1/api/"}, "ollama", "http://h:1/v1", "llama3"),
        ({"model": "lm_studio/a/b"}, "lmstudio", "http://localhost:1234/v1", "a/b"),
        (
            {"model": "a/b", "custom_llm_provider": "hosted_vllm", "api_base": "http://h/v1"},
            "vllm",
            "http://h/v1",
            "a/b",
        ),
        ({"model": "hosted_vllm/a", "base_url": "os.environ/BASE"}, "vllm", "http://from-env/v1", "a"),
    ],
)
def test_providers(params: dict[str, Any], runtime: str, url: str, name: str) -> None:
    document, _ = imported(one(**params), BASE="http://from-env/v1")
    (provider,) = document["providers"]
    assert (provider.get("runtime", ""), provider["base_url"]) == (runtime, url)
    assert [model["api_name"] for model in provider["models"]] == [name]
    if "openai.com" in url:
        assert provider["api_key"] == "env:OPENAI_API_KEY"


def test_numbers_keep_all_their_digits() -> None:
    """A price in a small currency has seven digits and more."""
    written = tomllib.loads(toml({"a": 1234567.0, "b": 0.1, "c": 1e300, "d": 30.0, "e": 12345678.5}))
    assert written == {"a": 1234567, "b": 0.1, "c": 1e300, "d": 30, "e": 12345678.5}


def test_rates_are_weights_and_said_to_be_no_limits() -> None:
    config = {"model_list": [*one(model="openai/a", api_base="http://a/v1", rpm=600)["model_list"],
                             *one(model="openai/a", api_base="http://b/v1", rpm=200, tpm=9)["model_list"]]}  # fmt: skip
    document, notes = imported(config)
    assert [provider.get("weight", 1) for provider in document["providers"]] == [3, 1]
    assert {path.rpartition(".")[2] for path in notes} == {"rpm", "tpm"}
    assert "max_in_flight" in notes["model_list[0].litellm_params.rpm"]


def test_a_wildcard_asks_the_server() -> None:
    config = {"model_list": [{"model_name": "*", "litellm_params": {"model": "openai/*", "api_base": "http://a/v1"}}]}
    document, notes = imported(config)
    assert "models" not in document["providers"][0]
    assert "wildcard" in notes["model_list[0]"]


def test_one_name_for_two_models_of_a_host_makes_two_providers(tmp_path: Path) -> None:
    config = {"model_list": [*one(model="openai/a", api_base="http://h/v1")["model_list"],
                             *one(model="openai/b", api_base="http://h/v1")["model_list"]]}  # fmt: skip
    document, _ = imported(config)
    assert [provider["provider"] for provider in document["providers"]] == ["openai-h", "openai-h-2"]
    file = tmp_path / "x.toml"
    file.write_text(toml(document))
    assert len(load({"HOME": "/x"}, toml_file=file).providers) == 2


def test_nothing_is_passed_over_silently() -> None:
    """Every key that nobody knows is named, at every level, with its path."""
    config = {
        "model_list": [
            {"model_name": "m", "odd": 1, "litellm_params": {"model": "openai/a", "api_base": "http://h/v1", "odd": 1,
             "temperature": 0.1, "timeout": "soon"}, "model_info": {"odd": 1}},
            {"litellm_params": {"model": "hosted_vllm/a"}},
            7,
        ],
        "router_settings": {"odd": 1, "fallbacks": [7, {"nobody": ["m"]}], "model_group_alias": {"a": "nobody"}},
        "litellm_settings": {"odd": 1, "default_fallbacks": ["nobody"]},
        "general_settings": {"odd": 1, "master_key": "sk-1234"},
        "odd": {"x": 1},
    }  # fmt: skip
    _, notes = imported(config)
    assert set(notes) == {
        "model_list[0].odd", "model_list[0].litellm_params.odd", "model_list[0].litellm_params.temperature",
        "model_list[0].litellm_params.timeout", "model_list[0].model_info.odd",
        "model_list[1].litellm_params.api_base", "model_list[2]",
        "router_settings.odd", "router_settings.fallbacks[0]", "router_settings.fallbacks[1].nobody",
        "router_settings.model_group_alias.a",
        "litellm_settings.odd", "litellm_settings.default_fallbacks[0]",
        "general_settings.odd", "general_settings.master_key", "odd",
    }  # fmt: skip


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", "import", "litellm", *arguments],
        capture_output=True, text=True, check=False, env={"HOME": "/x", "PATH": os.environ["PATH"], **environ},
    )  # fmt: skip


async def test_the_command_and_a_gateway_that_runs_on_its_result(tmp_path: Path) -> None:
    async with SimServer(models=("org/model",)) as sim:
        source, out = tmp_path / "config.yaml", tmp_path / "gateway.toml"
        source.write_text(
            "model_list:\n"
            "- model_name: chat\n"
            f"  litellm_params: {{model: hosted_vllm/org/model, api_base: '{sim.url}', rpm: 10}}\n"
        )
        done = await asyncio.to_thread(run, str(source), "--out", str(out))
        assert (done.returncode, done.stdout) == (0, "")
        assert "model_list[0].litellm_params.rpm: " in done.stderr
        assert out.stat().st_mode & 0o777 == 0o600
        again = await asyncio.to_thread(run, str(source), "--out", str(out))
        assert (again.returncode, "File exists" in again.stderr) == (2, True)
        config = load({"HOME": "/x"}, toml_file=out)
        async with gateway(*config.providers) as here:
            assert (await here.ask("POST", CHAT, chat("chat", max_tokens=1))).status == 200
            assert here.record.model == "org/model"


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text, code, said in (
        ("model_list: [", 2, "line "),
        ("a: 1", 2, "no `model_list`"),
        ("- 1", 2, "no `model_list`"),
        (json.dumps(one(model="openai/a", api_base="http://h/v1", api_key="os.environ/NOT_SET")), 1, "NOT_SET"),
    ):
        file.write_text(text)
        done = run(str(file))
        assert done.returncode == code, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    done = run(str(file), "--json", NOT_SET="k" * 16)
    document = json.loads(done.stdout)
    assert (done.returncode, document["rows"], document["problems"]) == (0, [], [])
    assert 'api_key = "env:NOT_SET"' in document["toml"]
    assert run(str(tmp_path / "none")).returncode == 2
