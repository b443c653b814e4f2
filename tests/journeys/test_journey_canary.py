"""Secrets, prompts and answers leave no trace, whatever becomes of a request: not in a log, a metric, a journal, the
store or an operator's page.
"""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Secret
from gateway.ledger.shipper import records_key
from gateway.oidc.grants import Grant
from gateway.sim import SimServer
from gateway.sim.faults import Faults
from gateway.store.client import Store
from tests.journeys.stage import CHAT, SIM_MODEL, Gateway, gateway, provider, until
from tests.oidc.issuer import AUDIENCE, TestIssuer
from tests.store_fixtures import Server

#: what a client and an operator would not want to find anywhere
PROMPT = "CANARY-prompt"
CREDENTIAL = "CANARY-upstream-credential"
ANSWER = "CANARY-answer"
QUERY = "CANARY-query"


def asked(**more: Any) -> dict[str, Any]:
    return {"model": SIM_MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, **more}


#: an engine that fails after its first word, and says more of it than it should
BROKEN = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"sim","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":"Once"},"finish_reason":null}]}\n\n'
    b'data: {"error":{"message":"%b","type":"server_error","code":500}}\n\n' % ANSWER.encode()
)

SAID = json.dumps({"error": {"message": ANSWER, "type": ANSWER, "param": ANSWER, "code": ANSWER}})

#: what may become of a request, and the body of one
WAYS: list[tuple[Faults, dict[str, Any]]] = [
    (Faults(), asked()),
    (Faults(), asked(stream=True)),
    (Faults(), asked(tools=[{"type": "function", "function": {"name": PROMPT, "parameters": {}}}])),
    (Faults(), asked(max_tokens=PROMPT)),
    (Faults(), asked(n=PROMPT, stream=PROMPT)),
    (Faults(), asked(**{PROMPT: 1, PROMPT.lower(): 2})),
    (Faults(status=400, body=json.dumps({"error": {"message": ANSWER}})), asked()),
    (Faults(status=401, body=CREDENTIAL), asked()),
    (Faults(status=429, body=ANSWER), asked()),
    (Faults(status=500, body=json.dumps({"error": ANSWER})), asked()),
    (Faults(body=json.dumps({"error": {"message": ANSWER}})), asked()),
    (Faults(body=f"data: {ANSWER}\n\n", content_type="text/event-stream"), asked(stream=True)),
    (Faults(body=BROKEN, content_type="text/event-stream"), asked(stream=True)),
    (Faults(first_token_s=0.2, slow_headers_s=0.2, status=400, body=SAID), asked(stream=True)),
    (Faults(body=ANSWER, bad_headers="control"), asked()),
    (Faults(headers=[("X-Odd", ANSWER), ("Content-Type", ANSWER)]), asked()),
    (Faults(reset=True), asked()),
    (Faults(cut_at_byte=40), asked()),
    (Faults(cut_at_token=2), asked(stream=True)),
    (Faults(error_event_at_token=2), asked(stream=True)),
    (Faults(clean_cut_at_token=2), asked(stream=True)),
    (Faults(stall_at_token=2), asked(stream=True)),
]


async def trouble(here: Gateway, keys: list[str]) -> None:
    """Requests that are wrong themselves, with each of `keys`."""
    for key in keys:
        for path in (f"/v1/models?{QUERY}={QUERY}", f"/{QUERY}", f"{CHAT}?key={QUERY}", f"/admin/api/keys/{QUERY}"):
            await here.ask("GET", path, headers=[("X-Secret", QUERY), ("Cookie", QUERY)], key=key)
        await here.ask("GET", f"/v1/usage?by={QUERY}", key=key)
        await here.ask("POST", CHAT, f'{{"model": "sim", "messages": [{PROMPT}'.encode(), key=key)
        await here.ask("POST", CHAT, json.dumps(asked()).encode() + b"\xff", key=key)
    async with here.connect() as client:
        client.send("POST", CHAT, asked(), [("Content-Encoding", PROMPT)], key=keys[0])
        await client.head()
    async with here.connect() as client:  # leaves in the middle of its request
        client.send("POST", CHAT, asked(stream=True, max_tokens=500), key=keys[0])
        await client.head()
        client.reset()


async def kept(store: Store) -> str:
    """All that is in the store."""
    found = []
    for key in await store.call("KEYS", "*"):
        kind = await store.call("TYPE", key)
        read = {
            b"string": ("GET", key),
            b"hash": ("HGETALL", key),
            b"stream": ("XRANGE", key, "-", "+"),
            b"set": ("SMEMBERS", key),
            b"zset": ("ZRANGE", key, 0, -1),
            b"list": ("LRANGE", key, 0, -1),
        }[kind.encode() if isinstance(kind, str) else kind]
        found.append(repr((key, await store.call(*read))))
    for _, fields in await store.call("XRANGE", records_key(store), "-", "+"):
        found.append(zlib.decompress(fields[b"z"]).decode())
    return "\n".join(found)


async def pages(here: Gateway, key: str) -> str:
    """What an operator is shown."""
    names = ("keys", "queue", "upstreams", "usage?by=key,model,upstream,day")
    paths = [f"/admin/api/{name}" for name in names] + ["/readyz", "/api/local-llm/providers", "/v1/models"]
    answers = [await here.ask("GET", path, key=key) for path in paths]
    assert {answer.status for answer in answers} == {200}
    return "\n".join(repr(answer) for answer in answers)


async def test_no_secret_no_prompt_and_no_answer_is_found_anywhere(
    tmp_path: Path, valkey_server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    async with (
        SimServer() as one,
        SimServer() as two,
        TestIssuer() as issuer,
        gateway(
            provider("fleet", one.url, two.url, api_key=CREDENTIAL),
            provider("away", "http://127.0.0.1:1", api_key=CREDENTIAL, models=["gone"]),
            keyed={"boss": {"roles": ("admin",)}},
            data_dir=tmp_path,
            store="auto",
            redis_url=Secret(valkey_server.url),
            auth_failures_per_min=0,
            oidc_issuer=issuer.url,
            oidc_audience=(AUDIENCE,),
            oidc_grants=(Grant(),),
            comment_s=0.05,
            upstream_idle_s=0.5,
        ) as here,
    ):
        await until(lambda: bool(here.app.tokens and here.app.tokens.signers.all), what="the issuer's keys")
        good, expired, foreign = issuer.token(), issuer.token(exp=1), issuer.token(iss="http://other")
        forged = good[:-8] + "AAAAAAAA"
        wrong = here.key[:-4] + "AAAA"
        answered = set()
        for faults, body in WAYS:
            for sim in (one, two):
                sim.faults = faults
            for key in (here.key, good):
                try:
                    async with asyncio.timeout(0.5):
                        answered.add((await here.ask("POST", CHAT, body, key=key)).status)
                except (TimeoutError, EOFError, OSError):
                    answered.add(499)
        assert {200, 400} < answered
        for sim in (one, two):
            sim.faults = Faults()
        await here.ask("POST", CHAT, asked(model="gone"))
        await trouble(here, [here.key, good, expired, foreign, forged, wrong])
        assert here.app.shipper is not None
        await until(lambda: here.app.shipper.shipped >= len(WAYS), 5.0, "records in the store")
        assert here.app.store is not None
        seen = {
            "the log": here.log_text() + caplog.text,
            "the metrics": await here.scrape(),
            "records": repr(here.records),
            "the store": await kept(here.app.store),
            "pages": await pages(here, here.keys["boss"]),
            "the journal": "".join(
                path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
            ),
        }
        assert '"key":"client"' in seen["the store"], "records are there to be looked at"
        assert "oidc:ada" in seen["the journal"]
        claims = good.split(".")[1]
        secrets = {
            "a prompt": PROMPT, "a credential": CREDENTIAL, "an answer": ANSWER, "a query": QUERY,
            "a key": here.key[20:], "an admin's key": here.keys["boss"][20:], "a wrong key": wrong[20:-6],
            "a token": good.split(".")[2][:40], "its claims": claims[20:60],
            "an expired token": expired.split(".")[2][:40], "a foreign token": foreign.split(".")[2][:40],
            "the basic form": base64.b64encode(CREDENTIAL.encode()).decode()[:20],
        }  # fmt: skip
        for what, secret in secrets.items():
            for where, text in seen.items():
                at = text.find(secret)
                assert at < 0, f"{what} in {where}: …{text[max(0, at - 200) : at + 60]!r}"
    out, err = capfd.readouterr()
    assert "CANARY" not in out + err
