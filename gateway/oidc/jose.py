"""joserfc as it is used here; imported when an issuer is configured, and not before."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from joserfc.jws import JWSRegistry

from gateway.oidc.issuer import modern

_HEADER_MAX_BYTES = 4096  # some issuers put their certificate there


class Registry(JWSRegistry):
    """`algorithms` by the names of RFC 9864; "EdDSA" (RFC 8037), which issuers still write, is Ed25519."""

    max_header_length = _HEADER_MAX_BYTES

    def __init__(self, algorithms: Collection[str]) -> None:
        super().__init__(algorithms=algorithms, strict_check_header=False)

    def get_alg(self, name: str) -> Any:
        return super().get_alg(modern(name))
