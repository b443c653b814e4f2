"""Signers: the public keys of an issuer, by their ids.

A task fetches them now and then, so a request waits for a fetch only if its token names a key that is not known, as
after a rotation; all such requests wait for the same one. Ids that nobody has cannot make the gateway fetch more than
once in `AGAIN_S`. What was fetched last is kept while the issuer is away or answers nonsense.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from gateway.errors import GatewayError
from gateway.oidc.issuer import Issuer, modern, trusted_url

if TYPE_CHECKING:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    Key = RSAKey | ECKey | OKPKey

_log = logging.getLogger("gateway.oidc")

#: fetches the text at a URL; raises GatewayError
Fetch = Callable[[str], Awaitable[bytes]]

DISCOVERY: Final = "/.well-known/openid-configuration"
EVERY_S: Final = 300.0
#: after a fetch that failed, and for the sake of an unknown key
AGAIN_S: Final = 10.0
_KEYS_MAX: Final = 64
_RSA_MIN_BITS: Final = 2048
_PUBLIC: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
#: a curve is for one algorithm, an RSA key for six
_BY_CURVE: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "Ed25519"}


class Signer:
    """One public key. `alg` is the only algorithm it is for, "" for all of RSA."""

    __slots__ = ("alg", "id", "key")

    def __init__(self, id: str, alg: str, key: Key) -> None:
        self.id = id
        self.alg = alg
        self.key = key

    def fits(self, id: str | None, alg: str) -> bool:
        return id in (None, self.id) and (self.alg == alg or (not self.alg and alg[:2] in ("RS", "PS")))


class Signers:
    """The keys of `issuer`, at its `jwks_url` or where its discovery document says."""

    def __init__(
        self,
        fetch: Fetch,
        issuer: Issuer,
        *,
        every_s: float = EVERY_S,
        again_s: float = AGAIN_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._fetch = fetch
        self._issuer = issuer.url
        self._jwks_url = issuer.jwks_url
        self._every_s = every_s
        self._again_s = again_s
        self._clock = clock
        self._raw = b""
        self._tried_at = -1e9
        self._running: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.all: tuple[Signer, ...] = ()
        self.fetches = 0
        #: changes with the keys: what was verified with those before is to be verified again
        self.version = 0
        #: why the keys may be out of date, "" if they are not
        self.trouble = ""

    def find(self, id: str | None, alg: str) -> list[Signer]:
        """The keys that may have signed a token with this key id (None: it names none) and algorithm."""
        return [one for one in self.all if one.fits(id, alg)]

    async def look(self) -> None:
        """Fetch now for a token whose key is not known, or wait for the fetch that runs.

        Too soon after the last, or with the issuer away, nothing changes.
        """
        if self._running is None and self._clock() - self._tried_at < self._again_s:
            return
        await asyncio.shield(self._begin())

    # -- following ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fetch, and again now and then until `stop`. Does not wait: an issuer that is away delays no start."""
        self._task = asyncio.create_task(self._follow(), name="follow the issuer's keys")

    async def stop(self) -> None:
        tasks = [task for task in (self._task, self._running) if task is not None]
        self._task = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self) -> None:
        while True:
            await asyncio.shield(self._begin())
            await asyncio.sleep(min(self._again_s, self._every_s) if self.trouble else self._every_s)

    def _begin(self) -> asyncio.Task[None]:
        if self._running is None:
            self._tried_at = self._clock()
            self._running = asyncio.create_task(self._refresh(), name="fetch the issuer's keys")
        return self._running

    async def _refresh(self) -> None:
        try:
            self.fetches += 1
            raw = await self._fetch(await self._address())
            if raw != self._raw:
                self.all = tuple(read_keys(raw))
                self._raw = raw
                self.version += 1
                _log.info("%d keys of %s are known", len(self.all), self._issuer)
            trouble = ""
        except Exception as error:  # whatever it is: it must end neither the following nor the requests that wait
            known = isinstance(error, GatewayError | ValueError)
            trouble = f"the keys of {self._issuer} cannot be fetched: {error if known else type(error).__name__}"
        finally:
            self._running = None
        if trouble and trouble != self.trouble:
            _log.warning("%s; %s", trouble, "those fetched before stay" if self.all else "no token can be verified")
        self.trouble = trouble

    async def _address(self) -> str:
        if self._jwks_url:
            return self._jwks_url
        document = _object(await self._fetch(self._issuer.rstrip("/") + DISCOVERY))
        # OpenID Connect Discovery 1.0, 4.3: must be identical, or another issuer's keys would speak for this one
        if document.get("issuer") != self._issuer:
            raise ValueError("its discovery document is of another issuer")
        url = document.get("jwks_uri")
        if not isinstance(url, str) or not trusted_url(url):
            raise ValueError("its discovery document names no jwks_uri with https")
        return url


def read_keys(raw: bytes) -> Iterable[Signer]:
    """The keys of a JWK Set (RFC 7517) that can verify signatures; others are left out. Raises ValueError if it is no
    set, or if none is left: an issuer signs with something, so that is a fault.
    """
    listed = _object(raw).get("keys")
    if not isinstance(listed, list):
        raise ValueError("the answer is no JWK Set")
    found = [signer for one in listed[:_KEYS_MAX] if (signer := _signer(one)) is not None]
    if not found:
        raise ValueError("the JWK Set holds no key that can be used")
    return found


def _signer(raw: object) -> Signer | None:
    from joserfc.errors import JoseError
    from joserfc.jwk import import_key

    if not isinstance(raw, dict):
        return None
    kind, alg, id = raw.get("kty"), raw.get("alg", ""), raw.get("kid", "")
    if kind not in _PUBLIC or raw.get("use", "sig") != "sig" or "verify" not in raw.get("key_ops", ("verify",)):
        return None  # a symmetric key among them would let the issuer's readers sign
    if not isinstance(alg, str) or not isinstance(id, str):
        return None
    alg = modern(alg)
    if kind == "RSA":
        fitting = alg if alg[:2] in ("", "RS", "PS") else None
    else:
        fitting = _BY_CURVE.get(str(raw.get("crv")))
    if fitting is None or (alg and alg != fitting):
        return None
    try:
        if kind == "RSA" and _bits(raw["n"]) < _RSA_MIN_BITS:
            return None
        key: Any = import_key({"kty": kind, **{name: raw[name] for name in _PUBLIC[kind]}})
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    return Signer(id, fitting, key)


def _bits(number: str) -> int:
    """The length of a number in base64url."""
    return int.from_bytes(base64.urlsafe_b64decode(number + "=" * (-len(number) % 4))).bit_length()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ValueError("the answer is no JSON object")
    return document
