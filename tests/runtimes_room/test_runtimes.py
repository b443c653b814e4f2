"""The contract every entry of RUNTIMES keeps, and the telling apart of recorded servers."""

from __future__ import annotations

import json
import re

import pytest

from gateway.runtimes import RUNTIMES, Runtime, guess
from gateway.runtimes.runtime import MODELS_MAX
from tests.replay import Recording, load

every = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())

#: recordings of real servers' model lists: (runtime, transcript, names in it)
LISTS = [
    ("vllm", "vllm/02-models", ("smol",)),
    ("llamacpp", "llama-server/02-models", ("smol",)),
    ("ollama", "ollama/o03-tags", ("smol:latest",)),
    ("litellm", "litellm/02-models", ("mock", "mock-429", "llama")),
]


@every
def test_name_is_its_key(runtime: Runtime) -> None:
    assert RUNTIMES[runtime.name] is runtime
    assert re.fullmatch(r"[a-z]+", runtime.name)
    assert runtime.title


@every
def test_doors_are_plain_absolute_paths(runtime: Runtime) -> None:
    paths = [runtime.health_path, runtime.models_path, *runtime.paths.values(), *runtime.manage.values()]
    for path in paths:
        assert re.fullmatch(r"(/[a-z0-9_]+)+", path), path


@every
def test_health_door_is_free(runtime: Runtime) -> None:
    """A GET of LiteLLM's /health makes a real call to every model; no prompt door may serve as health either."""
    assert runtime.health_path not in runtime.paths.values() or runtime.health_path == runtime.models_path
    if runtime.name == "litellm":
        assert runtime.health_path != "/health"


@every
def test_allow_list_denies_by_default(runtime: Runtime) -> None:
    assert {"chat", "completions", "embeddings"} <= set(runtime.paths)
    for operation in ("", "pull", "delete", "create", "slots", "/v1/chat/completions"):
        assert runtime.target("/v1", operation) is None
    managing = {"pull", "push", "create", "copy", "delete", "load", "unload", "slots", "tokenize"}
    for path in runtime.paths.values():
        assert not managing & set(path.split("/")), path


@every
def test_allow_list_cannot_be_changed(runtime: Runtime) -> None:
    with pytest.raises(TypeError):
        runtime.paths["pull"] = "/api/pull"  # type: ignore[index]


@every
def test_parser_tells_nonsense_from_an_empty_list(runtime: Runtime) -> None:
    for body in (b"", b"<html>", b"{}", b'"text"', b'{"data": 1, "models": 1}', b"\xff"):
        with pytest.raises(ValueError, match="model list"):
            runtime.parse_models(body)
    assert runtime.parse_models(b'{"data": [], "models": []}') == ()
    assert runtime.parse_models(b'{"data": null, "models": null}') == ()


@every
def test_parser_passes_over_entries_without_a_name(runtime: Runtime) -> None:
    body = b"""{"data": [{"id": "a"}, {}, null, {"id": 3}, {"id": ""}, {"id": "b"}, {"id": "a"}],
               "models": [{"name": "a"}, {}, null, {"name": 3}, {"name": ""}, {"name": "b"}, {"name": "a"}]}"""
    assert runtime.parse_models(body) == ("a", "b")


def test_parser_bounds_the_number_of_names() -> None:
    body = b'{"data": [%s]}' % b",".join(b'{"id": "m%d"}' % n for n in range(MODELS_MAX + 10))
    assert len(RUNTIMES["vllm"].parse_models(body)) == MODELS_MAX


@pytest.mark.parametrize(("name", "transcript", "models"), LISTS)
def test_recorded_model_list(name: str, transcript: str, models: tuple[str, ...]) -> None:
    (recording,) = load(transcript)
    assert RUNTIMES[name].parse_models(recording.body) == models
    assert guess(recording.header("server"), recording.body) == name


def test_guess_ollama_by_its_openai_list() -> None:
    (recording,) = load("ollama/02-models")
    assert guess(recording.header("server"), recording.body) == "ollama"


@pytest.mark.parametrize(
    ("server", "body", "name"),
    [
        ("", b'{"object":"list","data":[{"id":"gpt-4","object":"model"}]}', "localai"),
        ("", b'{"data":[{"id":"x","object":"model","owned_by":"organization_owner"}],"object":"list"}', "lmstudio"),
        ("", b'{"object":"list","data":[{"id":"x","object":"model","created":1,"owned_by":"me"}]}', "openai"),
        ("", b'{"object":"list","data":[]}', "openai"),
        ("llama.cpp", b'{"object":"list","data":[]}', "llamacpp"),
        ("", b'{"models":[]}', "ollama"),
        ("", b'{"models":null}', "ollama"),
    ],
)
def test_guess(server: str, body: bytes, name: str) -> None:
    assert guess(server, body) == name


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"detail":"Not Found"}', b""])
def test_guess_refuses_what_is_no_model_list(body: bytes) -> None:
    with pytest.raises(ValueError, match="model list"):
        guess("nginx", body)


@pytest.mark.parametrize(
    ("prefix", "chat", "health"),
    [
        ("/v1", "/v1/chat/completions", "/health"),
        ("/gpu/v1", "/gpu/v1/chat/completions", "/gpu/health"),
        ("", "/v1/chat/completions", "/health"),
        ("/openai", "/openai/chat/completions", "/openai/health"),
    ],
)
def test_where_operations_are_behind_a_base_url(prefix: str, chat: str, health: str) -> None:
    vllm = RUNTIMES["vllm"]
    assert vllm.target(prefix, "chat") == chat
    assert vllm.locate(prefix, vllm.health_path) == health


def test_recordings_are_whole() -> None:
    recordings = [recording for _, transcript, _ in LISTS for recording in load(transcript)]
    assert all(isinstance(recording, Recording) and recording.status == 200 for recording in recordings)
    assert all(int(recording.header("content-length")) == len(recording.body) for recording in recordings)


def test_vllm_says_how_many_tokens_its_cache_holds() -> None:
    parse = RUNTIMES["vllm"].parse_cache
    line = b'vllm:cache_config_info{block_size="16",engine="%d",num_gpu_blocks="5000",other="7"} 1.0\n'
    assert parse(b"# TYPE x gauge\n" + line % 0) == 80_000
    assert parse(line % 0 + line % 1) == 160_000
    assert parse(b'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0') == 0
    assert parse(b"") == parse(b"\xff{}") == 0


@every
def test_names_that_would_break_a_line_are_passed_over(runtime: Runtime) -> None:
    key = "models" if runtime.models_path == "/api/tags" else "data"
    names = ["a\r\nset-cookie: b:latest", "c\x00", "d e", "\u2028"]
    body = json.dumps({key: [{"id": name, "name": name} for name in names]})
    assert runtime.parse_models(body.encode()) == ("d e",)
