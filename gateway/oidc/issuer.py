"""Issuer: whose tokens are believed, and how they must be. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway.oidc.grants import EVERYBODY, Grant

if TYPE_CHECKING:
    from gateway.config import Config

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

    @classmethod
    def configured(cls, config: Config) -> Issuer | None:
        """The one that the configuration names, None if it names none."""
        if config.oidc_issuer is None:
            return None
        return cls(
            url=config.oidc_issuer,
            audience=config.oidc_audience,
            jwks_url=config.oidc_jwks_url or "",
            algorithms=config.oidc_algorithms,
            leeway_s=config.oidc_leeway_s,
            name_claim=config.oidc_name_claim,
            group_claim=config.oidc_group_claim or "",
            grants=config.oidc_grants or EVERYBODY,
        )


def modern(algorithm: str) -> str:
    """The name of a signature algorithm by RFC 9864, which names the curve: many still write "EdDSA" (RFC 8037)."""
    return "Ed25519" if algorithm == "EdDSA" else algorithm


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
