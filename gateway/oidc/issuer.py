"""Issuer: whose tokens are believed, and how they must be. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gateway.oidc.grants import EVERYBODY, Grant

#: asymmetric, all: with a symmetric one, a public key could be taken for the secret
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519")


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """`url` is the `iss` of its tokens, to the letter; a token must be for one of `audience`."""

    url: str
    audience: tuple[str, ...]
    jwks_url: str = ""
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    leeway_s: float = 30.0
    name_claim: str = "sub"
    group_claim: str = ""
    grants: tuple[Grant, ...] = EVERYBODY


def trusted_url(url: str) -> bool:
    """Whether keys may be fetched there: by https, or from this machine. Over plain http anybody on the way could name
    keys of his own.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    local = host in ("localhost", "127.0.0.1", "::1")
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and local))


def looks_like_token(presented: str) -> bool:
    """By its shape: three parts, the first a JSON object in base64url. Costs an API key one comparison."""
    return presented.startswith("eyJ") and presented.count(".") == 2
