"""Tokens: a JSON Web Token (RFC 7519) presented as a key -> its Principal, or why not.

Verified as RFC 8725 asks: algorithms by an allow-list in which no symmetric one can stand, the key's own algorithm and
use respected, `iss`, `aud` and `exp` required, other kinds of token (`typ`) refused. A token that was verified is
known by a keyed digest until it expires or the issuer's keys change, so it is verified once, not on each request.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import Forbidden, GatewayError, Unauthorized
from gateway.oidc.grants import grant_of, principal_of
from gateway.oidc.issuer import modern

if TYPE_CHECKING:
    from gateway.identity.principals import Principal
    from gateway.oidc.issuer import Issuer
    from gateway.oidc.signers import Signer, Signers

#: `typ` of tokens that give access (RFC 9068) or say who somebody is; a logout token of the same issuer does neither
_TYPES: Final = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
#: code of a token that is none, or that nobody trusted has signed
FORGED: Final = "invalid_token"
TOKEN_MAX_CHARS: Final = 16_384
_CACHE_MAX: Final = 10_000
_EXP_MAX: Final = 10**11
#: keys tried for a token that names none
_TRIES_MAX: Final = 8


class Tokens:
    """Verifies tokens of `issuer` with the keys of `signers`."""

    def __init__(self, issuer: Issuer, signers: Signers) -> None:
        self._issuer = issuer
        self.signers = signers
        self._salt = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=32)
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._version = 0
        #: one object for each principal: the limits remember their buckets by it
        self._principals: dict[str, Principal] = {}

    def known(self, token: str, now_unix_s: float) -> Principal | None:
        """Who presents this token, if it was verified before and still holds."""
        self._forget_older()
        found = self._known.get(self._mark_of(token))
        return found[0] if found is not None and now_unix_s < found[1] else None

    async def verify(self, token: str, now_unix_s: float) -> Principal:
        """Who presents this token.

        Raises Unauthorized, whose code is FORGED if no key of the issuer signed it; Forbidden if no grant fits; or,
        where no key of the issuer is known yet, GatewayError (503).
        """
        found = self.known(token, now_unix_s)
        if found is not None:
            return found
        if len(token) > TOKEN_MAX_CHARS:
            raise Unauthorized("this token is too long", code=FORGED)
        header = _header(token)
        alg, id = modern(header["alg"]), header.get("kid")
        if alg not in self._issuer.algorithms:
            raise Unauthorized("this token's algorithm is not accepted here", code=FORGED)
        signers = self.signers.find(id, alg)
        if not signers:
            await self.signers.look()
            signers = self.signers.find(id, alg)
        if not self.signers.all:
            raise GatewayError("tokens cannot be verified now: the issuer's keys are not known", status=503,
                               code="issuer_unavailable", retry_after_s=5)  # fmt: skip
        claims = self._signed(token, alg, signers)
        until_unix_s = self._check(claims, now_unix_s)
        principal = self._principal(claims)
        self._remember(token, principal, until_unix_s)
        return principal

    def _signed(self, token: str, alg: str, signers: list[Signer]) -> dict[str, Any]:
        """The claims, if one of the keys has signed them."""
        from joserfc import jwt
        from joserfc.errors import JoseError

        from gateway.oidc.jose import Registry

        registry = Registry([alg])
        for signer in signers[:_TRIES_MAX]:
            try:
                return jwt.decode(token, signer.key, algorithms=[alg], registry=registry).claims
            except (JoseError, ValueError, RecursionError):
                continue
        raise Unauthorized("this token is not signed by a key of the issuer", code=FORGED)

    def _check(self, claims: dict[str, Any], now_unix_s: float) -> float:
        """Until when (wall time) the token holds. Raises Unauthorized."""
        from joserfc.errors import ExpiredTokenError, JoseError
        from joserfc.jwt import JWTClaimsRegistry

        issuer = self._issuer
        # The library's own leeway is in whole seconds, and so is its clock.
        registry = JWTClaimsRegistry(
            now=int(now_unix_s),
            leeway=int(issuer.leeway_s),
            iss={"essential": True, "value": issuer.url},
            aud={"essential": True, "values": list(issuer.audience)},
            exp={"essential": True},
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise _refused("this token has expired", "token_expired") from None
        except JoseError as error:
            name = getattr(error, "claim", "") or "claims"
            raise _refused(f"this token is not accepted here: look at its `{name}`") from None
        return float(min(claims["exp"], _EXP_MAX)) + issuer.leeway_s

    def _principal(self, claims: dict[str, Any]) -> Principal:
        issuer = self._issuer
        grant = grant_of(issuer.grants, claims)
        if grant is None:
            raise Forbidden("this token is genuine, and nothing is granted to its holder", code="token_not_granted")
        try:
            principal = principal_of(grant, claims, issuer.url, issuer.name_claim, issuer.group_claim)
        except KeyError:
            raise _refused(f"this token has no `{issuer.name_claim}`") from None
        before = self._principals.get(principal.key_id)
        if before == principal:
            return before
        if len(self._principals) >= _CACHE_MAX:
            self._principals.clear()
        self._principals[principal.key_id] = principal
        return principal

    def _forget_older(self) -> None:
        """What was verified with keys that may be withdrawn by now."""
        if self._version != self.signers.version:
            self._version = self.signers.version
            self._known.clear()

    def _remember(self, token: str, principal: Principal, until_unix_s: float) -> None:
        self._forget_older()
        if len(self._known) >= _CACHE_MAX:
            self._known.pop(next(iter(self._known)))
        self._known[self._mark_of(token)] = (principal, until_unix_s)

    def _mark_of(self, token: str) -> bytes:
        mark = self._salt.copy()
        mark.update(token.encode("utf-8", "surrogateescape"))
        return mark.digest()


def _refused(message: str, code: str = "token_refused") -> Unauthorized:
    """For a token that the issuer did sign: nobody has guessed it."""
    return Unauthorized(message, code=code)


def _header(token: str) -> dict[str, Any]:
    """The header of a token nobody has verified: enough to find the key."""
    from joserfc.errors import JoseError
    from joserfc.jws import extract_compact

    from gateway.oidc.jose import Registry

    try:
        header = extract_compact(token.encode("ascii"), registry=Registry(())).headers()
        well = isinstance(header["alg"], str) and isinstance(header.get("kid", ""), str) and "crit" not in header
        kind = header.get("typ", "")
        if well and isinstance(kind, str) and kind.lower() in _TYPES:
            return header
    except (JoseError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Unauthorized("this token cannot be read, or is of a kind that gives no access", code=FORGED)
