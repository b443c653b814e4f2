"""Limits and budgets as they are written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigError, load
from gateway.config.check import rows
from gateway.limits.spec import (
    Budget,
    Limit,
    SpecError,
    budget_document,
    limit_document,
    parse_budget,
    parse_limit,
    parse_limits,
)

WHOLE = {"name": "r", "scope": "key_model", "resource": "requests", "burst": 60, "per_min": 120, "observe": True}


def test_a_limit() -> None:
    assert parse_limit(WHOLE) == Limit("r", "key_model", "requests", 60, 2.0, True)
    assert parse_limit({"resource": "concurrent", "burst": 4}) == Limit("concurrent-per-key", "key", "concurrent", 4)
    assert parse_limit({"resource": "total_tokens", "burst": 1, "per_h": 7200}).per_s == 2.0


@pytest.mark.parametrize("one", [parse_limit(WHOLE), Limit("c", "group", "concurrent", 1)])
def test_a_limit_can_be_read_as_it_was_written(one: Limit) -> None:
    assert parse_limit(json.loads(json.dumps(limit_document(one)))) == one


def test_a_budget() -> None:
    budget = parse_budget({"amount": 12.5, "period": "month"})
    assert budget == Budget(12.5, "currency", "month")
    assert parse_budget(budget_document(budget)) == budget


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"burst": 0}, "burst"),
        ({"burst": 1.5}, "burst"),
        ({"burst": True}, "burst"),
        ({"burst": 10**10}, "burst"),
        ({"per_min": 0}, "per_min"),
        ({"per_min": float("nan")}, "per_min"),
        ({"per_s": 1}, "per_s"),
        ({"scope": "user"}, "scope"),
        ({"scope": ["key"]}, "scope"),
        ({"resource": "token"}, "resource"),
        ({"resource": "concurrent"}, "per_min"),
        ({"name": "a b"}, "name"),
        ({"observe": "yes"}, "observe"),
        ({"rate": 1}, "rate"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_limit(WHOLE | change)
    assert caught.value.field == field


@pytest.mark.parametrize("raw", [{"amount": -1, "period": "day"}, {"amount": 1}, {"amount": "1", "period": "day"}, []])
def test_budgets_that_cannot_be(raw: object) -> None:
    with pytest.raises(SpecError):
        parse_budget(raw)


def test_names_are_given_once() -> None:
    with pytest.raises(SpecError, match=r"\[1\].name: 'r' is already"):
        parse_limits([WHOLE, WHOLE])


def test_from_the_environment_and_from_toml(tmp_path: Path) -> None:
    config = load({"HOME": "/home/x", "GATEWAY_LIMITS": json.dumps([WHOLE]), "GATEWAY_LIMITS_SHARE": "0.25"})
    assert config.limits == (parse_limit(WHOLE),)
    assert config.limits_share == 0.25
    assert (
        "limits.r",
        "60 requests by key and model, 2 per second, only observed",
        "environment GATEWAY_LIMITS",
    ) in rows(config)
    toml = tmp_path / "gateway.toml"
    toml.write_text('[[limits]]\nresource = "requests"\nburst = 5\nper_s = 1\n')
    assert load({"HOME": "/home/x"}, toml_file=toml).limits == (Limit("requests-per-key", "key", "requests", 5, 1.0),)


@pytest.mark.parametrize(("text", "message"), [("[", "must be a JSON array"), ('[{"burst":1}]', "[0].resource")])
def test_from_the_environment_wrongly(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"HOME": "/home/x", "GATEWAY_LIMITS": text})
    assert message in str(caught.value)
