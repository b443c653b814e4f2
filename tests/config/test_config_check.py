"""What `check` shows: every value with its origin, secrets masked; or every problem."""

import json
from pathlib import Path

import pytest

from gateway.config import ConfigError, load
from gateway.config.check import effective_data, effective_text, problems_data, problems_text, rows

ENVIRON = {
    "HOME": "/home/x",
    "GATEWAY_API_KEYS": "alice=alice-secret-0123456789abcdef",
    "GATEWAY_METRICS_LISTEN": "off",
    "OPENAI_COMPATIBLE_DATA": json.dumps(
        [
            {
                "provider": "p",
                "baseUrl": "http://h/v1",
                "apiKey": "sk-upstream-0123456789abcdef",
                "models": [{"apiName": "m", "price": {"output": 0.5}}],
                "timeouts": {"idle": None, "connect": 2},
            },
            {"provider": "empty", "baseUrl": "http://e/v1", "models": []},
        ]
    ),
    "OLLAMA_BASE_URL": "http://o:11434",
}
DATA = "environment OPENAI_COMPATIBLE_DATA"


def test_rows_have_value_and_origin() -> None:
    shown = {path: (value, origin) for path, value, origin in rows(load(ENVIRON))}
    expected = {
        "listen": ("127.0.0.1:8700", "default"),
        "metrics_listen": ("off", "environment GATEWAY_METRICS_LISTEN"),
        "access_log": ("true", "default"),
        "shutdown_s": ("30", "default"),
        "api_keys.alice": ("…cdef", "environment GATEWAY_API_KEYS"),
        "ollama_base_url": ("http://o:11434", "environment OLLAMA_BASE_URL"),
        "providers[0].provider": ("p", f"{DATA}[0]"),
        "providers[0].api_key": ("sk-…cdef", f"{DATA}[0]"),
        "providers[0].weight": ("1", "default"),
        "providers[0].runtime": ("openai", "default"),
        "providers[0].timeouts.idle": ("off", f"{DATA}[0].timeouts"),
        "providers[0].timeouts.connect": ("2", f"{DATA}[0].timeouts"),
        "providers[0].timeouts.total": ("off", "default"),
        "providers[0].models[0].api_name": ("m", f"{DATA}[0].models[0]"),
        "providers[0].models[0].ui_name": ("m", "default"),
        "providers[0].models[0].price": ("output 0.5", f"{DATA}[0].models[0].price"),
        "providers[1].models": ("(none)", f"{DATA}[1]"),
        "providers[2].models": ("(asked of the provider)", "environment OLLAMA_BASE_URL"),
        "providers[2].timeouts.idle": ("60", "default"),
    }
    assert {path: shown[path] for path in expected} == expected


def test_text_is_aligned_and_ends_with_the_warnings() -> None:
    text = effective_text(load(ENVIRON))
    lines = text.splitlines()
    column = lines[0].index("from")
    assert all(line[column - 2 : column] == "  " for line in lines[: lines.index("")])
    assert lines[-2] == "1 warning in the configuration:"
    assert "OPENAI_COMPATIBLE_DATA[1].models" in lines[-1]
    for secret in ("alice-secret", "upstream-0123"):
        assert secret not in text
        assert secret not in json.dumps(effective_data(load(ENVIRON)))


def test_an_empty_configuration_can_be_shown() -> None:
    text = effective_text(load({"HOME": "/home/x"}))
    assert "providers       " in text
    assert "(none)" in text
    assert "warning" not in text.splitlines()[-1]


def test_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"GATEWAY_DEMO": "of", "GATEWAY_LISTN": "1"})
    found = caught.value.problems
    assert problems_text(found).splitlines() == [
        "2 problems in the configuration:",
        "  GATEWAY_LISTN: unknown variable; did you mean GATEWAY_LISTEN? [environment]",
        "  GATEWAY_DEMO = 'of': must be one of auto, on, off; did you mean off? [environment]",
    ]
    data = problems_data(found)
    assert data["ok"] is False
    assert data["problems"][1] == {
        "path": "GATEWAY_DEMO",
        "message": "must be one of auto, on, off",
        "value": "'of'",
        "hint": "",
        "nearest": "off",
        "origin": "environment",
    }
