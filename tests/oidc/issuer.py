"""An issuer of tokens over real HTTP: its discovery document, its JWK Set, and tokens signed with its private keys."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey

AUDIENCE = "llm-gateway"

Key = RSAKey | ECKey | OKPKey
#: made once: an RSA key takes its time
RSA: list[RSAKey] = [RSAKey.generate_key(2048, {"kid": f"rsa-{number}"}) for number in range(2)]
EC = ECKey.generate_key("P-256", {"kid": "ec-0"})
ED = OKPKey.generate_key("Ed25519", {"kid": "ed-0"})


class TestIssuer:
    """Serves until left. `keys` are what its JWK Set holds now; `asked` counts requests for it."""

    __test__ = False

    def __init__(self, *keys: Key) -> None:
        self.keys: list[Key] = list(keys) or [RSA[0], EC, ED]
        self.asked = 0
        self.jwks: bytes | None = None  # instead of the keys
        self.issuer: str | None = None  # in the discovery document, instead of its own
        self.down = False
        self.slow_s = 0.0
        self.url = ""

    async def __aenter__(self) -> TestIssuer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if path == "/jwks":
                self.asked += 1
            await asyncio.sleep(self.slow_s)
            if self.down:
                return
            status, body = self._answer(path)
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        finally:
            writer.close()

    def _answer(self, path: str) -> tuple[str, bytes]:
        if path == "/jwks":
            keys = [key.as_dict(private=False) for key in self.keys]
            return "200 OK", self.jwks if self.jwks is not None else json.dumps({"keys": keys}).encode()
        if path == "/.well-known/openid-configuration":
            document = {"issuer": self.issuer or self.url, "jwks_uri": f"{self.url}/jwks"}
            return "200 OK", json.dumps(document).encode()
        return "404 Not Found", b"{}"

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims that are right, with `changes`; a change to ... removes one."""
        now = int(time.time())
        right = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300}
        return {name: value for name, value in {**right, **changes}.items() if value is not ...}

    def token(self, key: Key | None = None, alg: str = "", header: dict[str, Any] | None = None, **claims: Any) -> str:
        key = key or self.keys[0]
        alg = alg or {"RSA": "RS256", "EC": "ES256", "OKP": "Ed25519"}[key.key_type]
        head = {"alg": alg, "kid": key.kid, **(header or {})}
        return jwt.encode(
            {name: value for name, value in head.items() if value is not ...},
            self.claims(**claims),
            key,
            algorithms=[alg],
        )
