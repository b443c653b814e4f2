"""Tokens of a trusted issuer in place of keys: over real sockets, with real keys and a real JWK Set."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from gateway.config import Config
from gateway.doctor import Finding, examine
from gateway.limits.spec import Limit
from gateway.oidc import signers as signers_module
from gateway.oidc.grants import Grant
from gateway.oidc.issuer import Issuer
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider, until
from tests.oidc.issuer import AUDIENCE, EC, ED, RSA, TestIssuer


@pytest.fixture
async def issuer() -> AsyncIterator[TestIssuer]:
    async with TestIssuer() as one:
        yield one


@asynccontextmanager
async def trusting(issuer: TestIssuer, **settings: Any) -> AsyncIterator[Gateway]:
    settings.setdefault("auth_failures_per_min", 0)
    settings.setdefault("oidc_algorithms", ("RS256", "ES256", "Ed25519"))
    async with (
        SimServer(models=("sim", "deep")) as sim,
        gateway(
            provider("one", sim.url, models=["sim", "deep"]),
            oidc_issuer=issuer.url,
            oidc_audience=(AUDIENCE,),
            **settings,
        ) as here,
    ):
        yield here


async def asked(here: Gateway, token: str, model: str = "sim") -> Answer:
    return await here.ask("POST", CHAT, chat(model, max_tokens=1), key=token)


@pytest.mark.parametrize("key", [RSA[0], EC, ED], ids=["RS256", "ES256", "Ed25519"])
async def test_a_token_of_each_kind_of_key(issuer: TestIssuer, key: Any) -> None:
    async with trusting(issuer) as here:
        assert (await asked(here, issuer.token(key))).status == 200
        assert here.record.key == "oidc:ada"
        answer = await here.ask("POST", CHAT, chat(), [("x-api-key", issuer.token(key))], key=None)
        assert answer.status == 200
        assert (await asked(here, here.key)).status == 200  # keys are as good as before
        assert here.record.key == "client"


async def test_the_older_name_of_ed25519(issuer: TestIssuer) -> None:
    """RFC 8037 calls it EdDSA, and so do most issuers; a key of the set may say so too."""
    with warnings.catch_warnings(action="ignore"):  # the library that signs it here says that the name is old
        token = jwt.encode({"alg": "EdDSA", "kid": "ed-0"}, issuer.claims(), ED, algorithms=["EdDSA"])
    issuer.jwks = json.dumps({"keys": [{**ED.as_dict(private=False), "alg": "EdDSA"}]}).encode()
    async with trusting(issuer, oidc_algorithms=("Ed25519",)) as here:
        assert (await asked(here, token)).status == 200
        assert (await asked(here, issuer.token(ED))).status == 200
    async with trusting(issuer, oidc_algorithms=("RS256",)) as here:
        assert (await asked(here, token)).status == 401


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def confused(issuer: TestIssuer) -> str:
    """Signed with HMAC, the public key as its secret: the oldest trick there is."""
    head = {"alg": "HS256", "typ": "JWT", "kid": RSA[0].kid}
    body = unsigned(head, issuer.claims()).rpartition(".")[0]
    mac = hmac.new(RSA[0].as_pem(private=False), body.encode(), hashlib.sha256).digest()
    return f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


NOW = int(time.time())
STRANGER = RSAKey.generate_key(2048, {"kid": "rsa-0"})
BAD = {
    "expired": (lambda issuer: issuer.token(exp=NOW - 600), "token_expired"),
    "without expiry": (lambda issuer: issuer.token(exp=...), "token_refused"),
    "expiry is text": (lambda issuer: issuer.token(exp="2999"), "token_refused"),
    "not yet": (lambda issuer: issuer.token(nbf=NOW + 600), "token_refused"),
    "issued in the future": (lambda issuer: issuer.token(iat=NOW + 600), "token_refused"),
    "another audience": (lambda issuer: issuer.token(aud="another"), "token_refused"),
    "other audiences": (lambda issuer: issuer.token(aud=["a", "b"]), "token_refused"),
    "no audience": (lambda issuer: issuer.token(aud=...), "token_refused"),
    "another issuer": (lambda issuer: issuer.token(iss="https://example.org"), "token_refused"),
    "issuer with a slash": (lambda issuer: issuer.token(iss=issuer.url + "/"), "token_refused"),
    "no subject": (lambda issuer: issuer.token(sub=...), "token_refused"),
    "alg none": (lambda issuer: unsigned({"alg": "none"}, issuer.claims()), "invalid_token"),
    "alg None": (lambda issuer: unsigned({"alg": "NONE", "kid": "rsa-0"}, issuer.claims()), "invalid_token"),
    "HMAC with the public key": (confused, "invalid_token"),
    "a key of somebody else": (lambda issuer: issuer.token(STRANGER), "invalid_token"),
    "alg of another kind of key": (
        lambda issuer: issuer.token(EC, header={"kid": "rsa-0"}),
        "invalid_token",
    ),
    "algorithm not listed": (lambda issuer: issuer.token(RSA[0], "PS256"), "invalid_token"),
    "another kind of token": (lambda issuer: issuer.token(header={"typ": "logout+jwt"}), "invalid_token"),
    "a critical header": (
        lambda issuer: unsigned({"alg": "RS256", "crit": ["x"], "x": 1, "kid": "rsa-0"}, issuer.claims(), b"x"),
        "invalid_token",
    ),
    "key in the header": (
        lambda issuer: issuer.token(STRANGER, header={"jwk": STRANGER.as_dict(private=False), "kid": "own"}),
        "invalid_token",
    ),
    "changed claims": (
        lambda issuer: ".".join(
            (unsigned({}, issuer.claims(sub="eve")).split(".")[1] if at == 1 else part)
            for at, part in enumerate(issuer.token().split("."))
        ),
        "invalid_token",
    ),
    "cut": (lambda issuer: issuer.token()[:-20], "invalid_token"),
    "no JSON": (lambda issuer: "eyJx.eyJx.eyJx", "invalid_token"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_token_that_is_not_good(issuer: TestIssuer, what: str) -> None:
    make, code = BAD[what]
    async with trusting(issuer) as here:
        assert (await asked(here, issuer.token())).status == 200
        token = make(issuer)
        answer = await asked(here, token)
        assert (answer.status, answer.error["code"]) == (401, code)
        assert answer.header("WWW-Authenticate") == "Bearer"
        assert here.record.key == ""
        assert token not in here.log_text() + repr(answer)


async def test_claims_that_are_right_in_other_ways(issuer: TestIssuer) -> None:
    async with trusting(issuer) as here:
        for token in (
            issuer.token(aud=["other", AUDIENCE]),
            issuer.token(exp=int(time.time()) - 10),  # within the leeway
            issuer.token(nbf=int(time.time()) + 10),
            issuer.token(header={"kid": ...}),
            issuer.token(header={"typ": "at+jwt"}),
            issuer.token(header={"x5c": ["x" * 600]}),
        ):
            assert (await asked(here, token)).status == 200, token


async def test_what_claims_grant(issuer: TestIssuer) -> None:
    grants = (
        Grant((("groups", "operators"), ("email_verified", True)), roles=("admin",)),
        Grant((("groups", "ml"),), group="ml", models=("deep",)),
        Grant((("realm_access.roles", "few"),), limits=(Limit("few", "key", "requests", 1, 0.001),)),
    )
    async with trusting(issuer, oidc_grants=grants, oidc_name_claim="email") as here:
        boss = issuer.token(email="boss@x.org", groups=["staff", "operators"], email_verified=True)
        assert (await here.ask("GET", "/admin/api/keys", key=boss)).status == 200
        unproven = issuer.token(email="boss@x.org", groups=["operators"], email_verified="true")
        assert (await asked(here, unproven)).status == 403

        ml = issuer.token(email="ml@x.org", groups=["ml"])
        assert (await here.ask("GET", "/admin/api/keys", key=ml)).status == 403
        assert (await asked(here, ml)).status == 403
        assert (await asked(here, ml, "deep")).status == 200
        assert (here.record.key, here.record.group) == ("oidc:ml@x.org", "ml")
        listed = (await here.ask("GET", "/v1/models", key=ml)).json()["data"]
        assert [one["id"] for one in listed] == ["deep"]

        claims = {"email": "few@x.org", "realm_access": {"roles": ["few"]}}
        assert (await asked(here, issuer.token(**claims))).status == 200
        again = await asked(here, issuer.token(**claims, jti="another token of the same holder"))
        assert again.status == 429

        nothing = await asked(here, issuer.token(email="x@x.org"))
        assert (nothing.status, nothing.error["code"]) == (403, "token_not_granted")


async def test_a_group_from_a_claim_and_names_that_do_not_collide(issuer: TestIssuer) -> None:
    async with trusting(issuer, oidc_group_claim="groups") as here:
        names = []
        for sub in ("a b", "a_b", "a\tb", "x" * 200, "x" * 201, "first"):
            assert (await asked(here, issuer.token(sub=sub, groups=["/", "/ml", "other"]))).status == 200
            names.append(here.record.key)
            assert here.record.group == "ml"
        assert len(set(names)) == len(names)
        assert all(name.startswith("oidc:") and len(name) <= 70 and name.isascii() for name in names)


async def test_a_token_is_verified_once_and_no_longer_than_it_holds(issuer: TestIssuer) -> None:
    async with trusting(issuer, oidc_leeway_s=0.0) as here:
        tokens = here.app.tokens
        assert tokens is not None
        now = int(time.time())
        token = issuer.token(exp=now + 100)
        assert tokens.known(token, now) is None
        assert (await asked(here, token)).status == 200
        found = tokens.known(token, now)
        assert found is not None
        assert tokens.known(token, now + 99) is found
        assert tokens.known(token, now + 100) is None
        again = issuer.token(exp=now + 200)
        await asked(here, again)
        assert tokens.known(again, now) is found  # one principal for all tokens of one holder
        assert issuer.asked == 1


async def test_a_key_of_a_rotation_is_fetched_once_for_all_and_an_old_one_ends(issuer: TestIssuer) -> None:
    async with trusting(issuer) as here:
        assert here.app.tokens is not None
        signers = here.app.tokens.signers
        before = issuer.token(RSA[0])
        assert (await asked(here, before)).status == 200
        issuer.keys = [RSA[1]]
        issuer.slow_s = 0.2
        signers._tried_at -= 10.0  # the last fetch was a while ago
        after = issuer.token(RSA[1])
        answers = await asyncio.gather(*(asked(here, after) for _ in range(10)))
        assert {answer.status for answer in answers} == {200}
        assert issuer.asked == 2
        assert (await asked(here, before)).status == 401  # it was known, and its key was withdrawn


async def test_key_ids_that_nobody_has_fetch_nothing(issuer: TestIssuer) -> None:
    async with trusting(issuer) as here:
        assert (await asked(here, issuer.token())).status == 200
        for number in range(20):
            token = issuer.token(STRANGER, header={"kid": f"made-up-{number}"})
            assert (await asked(here, token)).status == 401
        assert issuer.asked == 1


async def test_the_issuer_goes_away_and_its_keys_stay(issuer: TestIssuer, caplog: pytest.LogCaptureFixture) -> None:
    async with trusting(issuer) as here:
        assert here.app.tokens is not None
        signers = here.app.tokens.signers
        assert (await asked(here, issuer.token())).status == 200
        for trouble in ({"down": True}, {"jwks": b"<html>"}, {"jwks": b'{"keys": []}'}, {"jwks": b'{"keys": [7]}'}):
            issuer.down = trouble.get("down", False)  # type: ignore[assignment]
            issuer.jwks = trouble.get("jwks")  # type: ignore[assignment]
            signers._tried_at = -1e9
            await signers.look()
            assert signers.trouble, trouble
            assert (await asked(here, issuer.token(jti=repr(trouble)))).status == 200
            ready = await here.ask("GET", "/readyz")
            assert ready.status == 200
            assert "keys of" in ready.body.decode()
        issuer.down, issuer.jwks = False, None
        signers._tried_at = -1e9
        await signers.look()
        assert signers.trouble == ""
    assert "those fetched before stay" in caplog.text


async def test_a_fault_while_fetching_ends_nothing() -> None:
    answers = [RuntimeError("a fault"), json.dumps({"keys": [EC.as_dict(private=False)]}).encode()]

    async def fetch(url: str) -> bytes:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    where = "https://id.example.org/keys"
    issuer = Issuer(url="https://id.example.org", audience=(AUDIENCE,), jwks_url=where)
    signers = signers_module.Signers(fetch, issuer, again_s=0.01)
    signers.start()
    await until(lambda: signers.trouble, what="the fault")
    assert signers.trouble == "the keys of https://id.example.org cannot be fetched: RuntimeError"
    await until(lambda: signers.all, what="fetched again")
    assert signers.trouble == ""
    await signers.stop()


async def test_an_issuer_that_was_never_there_is_no_fault_of_the_client(issuer: TestIssuer) -> None:
    issuer.down = True
    async with trusting(issuer, auth_failures_per_min=1) as here:
        for _ in range(5):
            answer = await asked(here, issuer.token())
            assert (answer.status, answer.error["code"]) == (503, "issuer_unavailable")
        assert (await asked(here, here.key)).status == 200
        issuer.down = False
        assert here.app.tokens is not None
        here.app.tokens.signers._tried_at = -1e9
        assert (await asked(here, issuer.token())).status == 200


async def test_a_discovery_document_of_another_issuer_is_not_believed(issuer: TestIssuer) -> None:
    issuer.issuer = "https://example.org"
    async with trusting(issuer) as here:
        assert (await asked(here, issuer.token())).status == 503
        assert issuer.asked == 0


async def test_keys_from_an_address_of_their_own(issuer: TestIssuer) -> None:
    issuer.issuer = "https://nobody.asks/this"
    async with trusting(issuer, oidc_jwks_url=f"{issuer.url}/jwks") as here:
        assert (await asked(here, issuer.token())).status == 200


async def test_keys_that_must_not_verify_are_left_out(issuer: TestIssuer) -> None:
    rsa = RSA[0].as_dict(private=False)
    unusable = [
        {**rsa, "kid": "enc", "use": "enc"},
        {**rsa, "kid": "ops", "key_ops": ["encrypt"]},
        {**rsa, "kid": "alg", "alg": "HS256"},
        {"kty": "oct", "kid": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"},
        {"kty": "RSA", "kid": "short", "n": base64.urlsafe_b64encode(b"\xff" * 128).decode().rstrip("="), "e": "AQAB"},
        {"kty": "EC", "kid": "bad", "crv": "P-256", "x": "AA", "y": "AA"},
        {**EC.as_dict(private=False), "kid": "curve", "alg": "ES384"},
        {**EC.as_dict(private=False), "kid": "list", "crv": ["P-256"]},
        None,
    ]
    found = list(signers_module.read_keys(json.dumps({"keys": [*unusable, {**rsa, "kid": "good"}]}).encode()))
    assert [signer.id for signer in found] == ["good"]
    only = list(signers_module.read_keys(json.dumps({"keys": [{**rsa, "kid": "one", "alg": "RS512"}]}).encode()))
    assert only[0].fits("one", "RS512")
    assert not only[0].fits("one", "RS256")


async def test_bad_tokens_count_as_failures_of_their_address(issuer: TestIssuer) -> None:
    async with trusting(issuer, auth_failures_per_min=2) as here:
        good, late, forged = issuer.token(), issuer.token(exp=NOW - 600), issuer.token(STRANGER)
        for _ in range(10):  # the issuer did sign it: its holder guesses nothing, and may share an address with others
            assert (await asked(here, late)).status == 401
        assert (await asked(here, forged)).status == 401
        for _ in range(3):
            assert (await asked(here, forged)).status == 401
        refused = await asked(here, forged)
        assert (refused.status, refused.error["code"]) == (429, "too_many_wrong_keys")
        assert "too many wrong API keys" in refused.error["message"]
        assert (await asked(here, "llmgw_wrong")).status == 429  # keys can be guessed, and share the count
        for token in (good, issuer.token(jti="new")):  # no signature can: whoever renews a token is not shut out
            assert (await asked(here, token)).status == 200


async def test_without_an_issuer_a_token_is_a_wrong_key(issuer: TestIssuer) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as here:
        answer = await asked(here, issuer.token())
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert issuer.asked == 0


async def test_the_doctor_asks_the_issuer(issuer: TestIssuer, tmp_path: Path) -> None:
    async def found(**settings: Any) -> Finding:
        config = Config(data_dir=tmp_path, store="off", oidc_issuer=issuer.url, oidc_audience=(AUDIENCE,), **settings)
        (finding,) = [one for one in await examine(config) if one.name == "token issuer"]
        return finding

    finding = await found()
    assert (finding.status, finding.found) == ("ok", f"2 of the 3 keys of {issuer.url} are for RS256, ES256")
    assert (await found(oidc_algorithms=("ES512",))).status == "fail"  # of another curve
    issuer.keys = [ED]
    finding = await found()
    assert (finding.status, finding.advice) == ("fail", "name its algorithms in GATEWAY_OIDC_ALGORITHMS")
    issuer.down = True
    finding = await found()
    assert finding.status == "fail"
    assert "cannot be fetched" in finding.found
    assert not [one for one in await examine(Config(data_dir=tmp_path, store="off")) if one.name == "token issuer"]
