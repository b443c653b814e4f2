"""Fallbacks in the configuration: names that must exist, with the nearest that does, and chains that end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.config import Config, ConfigError, load


def entry(name: str, *models: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    listed = [{"apiName": one} if isinstance(one, str) else one for one in models]
    return {"provider": name, "baseUrl": f"http://{name}:8000/v1", "models": listed or None, **more}


def falling(name: str, *fallbacks: Any, **more: Any) -> dict[str, Any]:
    return {"apiName": name, "fallbacks": list(fallbacks), **more}


def read(*entries: dict[str, Any], **variables: str) -> Config:
    return load({"HOME": "/home/x", "OPENAI_COMPATIBLE_DATA": json.dumps(entries), **variables})


def refused(*entries: dict[str, Any]) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(*entries)
    return [
        (one.path.removeprefix("OPENAI_COMPATIBLE_DATA"), one.message, one.nearest) for one in caught.value.problems
    ]


def test_names_and_aliases_of_any_provider_are_known() -> None:
    small = {"apiName": "small", "aliases": ["chat"]}
    config = read(entry("one", falling("big", "small", "chat")), entry("two", small))
    assert config.providers[0].models[0].fallbacks == ("small", "chat")
    assert config.warnings == ()


def test_all_that_is_wrong_is_told_at_once() -> None:
    assert refused(
        entry("one", falling("big", "smal", "small", "small"), falling("x", "x")),
        entry("two", falling("small", 7), falling("y", "why", aliases=["why"]), {"apiName": "z", "fallbacks": "small"}),
    ) == [
        ("[0].models[0].fallbacks[2]", "the same as fallbacks[1]", ""),
        ("[1].models[0].fallbacks[0]", "must be text in quotes", ""),
        ("[1].models[2].fallbacks", "must be an array", ""),
        ("[0].models[0].fallbacks[0]", "there is no model 'smal'", "small"),
        ("[0].models[1].fallbacks[0]", "'x' falls back on itself", ""),
        ("[1].models[1].fallbacks[0]", "'y' falls back on itself", ""),
    ]


def test_where_a_server_is_asked_for_its_models_an_unknown_name_is_a_warning() -> None:
    config = read(entry("one", falling("big", "llama3:latest", "bigg")), entry("two"))
    assert [(one.path.rpartition(".")[2], one.nearest) for one in config.warnings] == [
        ("fallbacks[0]", ""),
        ("fallbacks[1]", "big"),
    ]
    ollama = read(entry("one", falling("big", "llama3")), OLLAMA_BASE_URL="http://localhost:11434/api")
    assert len(ollama.warnings) == 1


def test_a_circle_is_told_once_with_its_way_and_does_no_harm() -> None:
    config = read(entry("one", falling("a", "b"), falling("b", "see"), falling("c", "a", aliases=["see"])))
    (warning,) = config.warnings
    assert warning.message == "a -> b -> see -> a is a circle"
    assert warning.path.endswith("models[0].fallbacks[0]")
