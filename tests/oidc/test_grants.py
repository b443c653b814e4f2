"""Grants and the settings of an issuer: how they are read, and every way they can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config import ConfigError, load
from gateway.config.check import effective_text
from gateway.errors import BadRequest
from gateway.oidc.grants import Grant, claim, parse_grants
from gateway.oidc.issuer import looks_like_token, trusted_url

ISSUER = {"HOME": "/home/x", "GATEWAY_OIDC_ISSUER": "https://id.example.org/", "GATEWAY_OIDC_AUDIENCE": "a, b"}


def test_what_is_read() -> None:
    grants = '[{"when": {"groups": "ml", "ok": true}, "group": "ml", "budget": {"amount": 1, "period": "day"}}, {}]'
    config = load({**ISSUER, "GATEWAY_OIDC_GRANTS": grants, "GATEWAY_OIDC_ALGORITHMS": "ES256,Ed25519"})
    assert config.oidc_issuer == "https://id.example.org/"  # to the letter: `iss` is compared with it
    assert config.oidc_audience == ("a", "b")
    assert config.oidc_algorithms == ("ES256", "Ed25519")
    first, second = config.oidc_grants
    assert first.when == (("groups", "ml"), ("ok", True))
    assert second == Grant()
    shown = effective_text(config)
    assert "groups is ml and ok is True: group ml; all models; budget 1 currency a day" in shown
    assert "every token: all models" in shown


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"GATEWAY_OIDC_AUDIENCE": ""}, "GATEWAY_OIDC_ISSUER", "needs an audience"),
        ({"GATEWAY_OIDC_ISSUER": "http://id.example.org"}, "GATEWAY_OIDC_ISSUER", "https://"),
        ({"GATEWAY_OIDC_JWKS_URL": "ftp://id.example.org"}, "GATEWAY_OIDC_JWKS_URL", "https://"),
        ({"GATEWAY_OIDC_ALGORITHMS": "HS256"}, "GATEWAY_OIDC_ALGORITHMS", "must be of RS256"),
        ({"GATEWAY_OIDC_ALGORITHMS": "none"}, "GATEWAY_OIDC_ALGORITHMS", "must be of RS256"),
        ({"GATEWAY_OIDC_LEEWAY_S": "301"}, "GATEWAY_OIDC_LEEWAY_S", "at most 300"),
        ({"GATEWAY_OIDC_GRANTS": "x"}, "GATEWAY_OIDC_GRANTS", "JSON array"),
        ({"GATEWAY_OIDC_GRANTS": '[{"wen": {}}]'}, "GATEWAY_OIDC_GRANTS", "'wen'"),
    ],
)
def test_what_is_refused(changes: dict[str, str], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({**ISSUER, **changes})
    assert [problem.path for problem in caught.value.problems] == [path]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "grant",
    [
        7,
        {"when": []},
        {"when": {"": "x"}},
        {"when": {"groups": 7}},
        {"roles": ["king"]},
        {"models": "all"},
        {"limits": [{}]},
        {"budget": {"amount": -1, "period": "day"}},
        {"group": "a b"},
    ],
)
def test_grants_that_cannot_be(grant: Any) -> None:
    with pytest.raises(BadRequest):
        parse_grants([{}, grant])
    with pytest.raises(BadRequest):
        parse_grants(grant)


def test_claims_by_path() -> None:
    claims = {"a": {"b": ["x"]}, "https://x.org/roles": "y", "a.b": "whole"}
    assert claim(claims, "https://x.org/roles") == "y"
    assert claim(claims, "a.b") == "whole"
    assert claim({"a": {"b": ["x"]}}, "a.b") == ["x"]
    assert claim(claims, "a.c") is None
    assert claim({"a": "text"}, "a.b") is None
    assert not Grant((("groups", "m"),)).fits({"groups": "ml"})
    assert not Grant((("n", True),)).fits({"n": 1})


def test_shapes_and_addresses() -> None:
    assert looks_like_token("eyJhbGciOiJSUzI1NiJ9.e30.x")
    for other in ("llmgw_aaaaaaaaaa_x", "eyJhbGciOiJSUzI1NiJ9", "eyJ.a.b.c", ""):
        assert not looks_like_token(other)
    for url in ("https://x.org/a", "http://127.0.0.1:1", "http://[::1]/x", "http://localhost/"):
        assert trusted_url(url)
    for url in ("http://x.org", "http://127.0.0.1.x.org", "https://", "//x.org", "http://[", "file:///etc/passwd"):
        assert not trusted_url(url)
