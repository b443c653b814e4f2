"""`/admin/api/keys` over real sockets: what it does, who may, what it refuses, and that no key is ever shown again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.admin import Guarded
from gateway.config import Secret
from gateway.identity.principals import ROLES
from gateway.limits.spec import Limit
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Answer, Gateway, chat, gateway, provider
from tests.store_fixtures import Server

KEYS = "/admin/api/keys"
ENV_KEY = "a-key-of-the-environment"


class Admin:
    """A gateway and a key with the role "admin"."""

    def __init__(self, here: Gateway) -> None:
        self.here = here
        here.app.config.data_dir.mkdir(exist_ok=True)
        self.key, record = here.app.keys.ring.make_key("root", roles=("admin",))
        here.app.keys.ring.add(record)
        self.id = record.id

    async def ask(self, method: str, path: str = KEYS, body: Any = None) -> Answer:
        return await self.here.ask(method, path, body, key=self.key)

    async def create(self, **fields: Any) -> dict[str, Any]:
        answer = await self.ask("POST", KEYS, fields)
        assert answer.status == 201, answer
        made: dict[str, Any] = answer.json()
        return made

    async def status(self, key: str, model: str = "sim") -> int:
        return (await self.here.ask("POST", CHAT, chat(model, max_tokens=1), key=key)).status


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    async with (
        SimServer(models=("sim", "deep")) as sim,
        gateway(provider("one", sim.url, models=("sim", "deep")), data_dir=tmp_path) as here,
    ):
        here.app.keys.ring._configure("conf", Secret(ENV_KEY).value.encode())
        yield Admin(here)


# -- what it does ---------------------------------------------------------------------------------------------------


async def test_the_life_of_a_key(admin: Admin) -> None:
    made = await admin.create(name="ci", group="team", models=["sim"], expires_at="30d", metadata={"owner": "me"})
    key, id = made.pop("key"), made["id"]
    assert key.startswith(f"llmgw_{id}_")
    assert made["masked"] == f"llmgw_{id}_…"
    assert (made["status"], made["group"], made["models"], made["roles"]) == ("active", "team", ["sim"], [])
    assert await admin.status(key) == 200
    assert await admin.status(key, "deep") == 403
    assert (await admin.ask("GET", f"{KEYS}/{id}")).json() == made

    changed = (await admin.ask("PATCH", f"{KEYS}/{id}", {"models": None, "expires_at": None})).json()
    assert changed == {**made, "models": None, "expires_at": None, "revision": 2}
    assert await admin.status(key, "deep") == 200

    rotated = (await admin.ask("POST", f"{KEYS}/{id}/rotate")).json()
    again = rotated.pop("key")
    assert rotated["previous_valid_until"] is not None
    assert [await admin.status(one) for one in (key, again)] == [200, 200]
    last = (await admin.ask("POST", f"{KEYS}/{id}/rotate", {"overlap": "0s"})).json()["key"]
    assert [await admin.status(one) for one in (again, last)] == [401, 200]

    revoked = (await admin.ask("DELETE", f"{KEYS}/{id}")).json()
    assert revoked["status"] == "revoked"
    assert [await admin.status(one) for one in (key, again, last)] == [401, 401, 401]
    assert (await admin.ask("DELETE", f"{KEYS}/{id}")).json() == revoked
    rows = (await admin.ask("GET")).json()["rows"]
    assert {row["name"] for row in rows} == {"ci", "client", "root", "conf"}
    assert revoked in rows


async def test_limits_and_budget_come_back_as_they_were_sent(admin: Admin) -> None:
    limits = [{"name": "r", "scope": "key", "resource": "requests", "burst": 5, "per_s": 0.5, "observe": True}]
    budget = {"amount": 5.0, "unit": "tokens", "period": "week"}
    made = await admin.create(name="ci", limits=limits, budget=budget)
    assert (made["limits"], made["budget"]) == (limits, budget)
    ring = admin.here.app.keys.ring
    principal = ring.authenticate(made["key"], 0.0)
    assert principal is not None
    assert principal.limits[0].observe is True
    assert principal.budget is not None
    assert principal.budget.period == "week"


async def test_it_is_on_disk_when_the_answer_comes(admin: Admin, tmp_path: Path) -> None:
    made = await admin.create(name="ci")
    assert made["id"] in (tmp_path / "keys.json").read_text()
    await admin.ask("DELETE", f"{KEYS}/{made['id']}")
    assert '"revoked_at": null' not in (tmp_path / "keys.json").read_text().partition(made["id"])[2].partition("}")[0]


async def test_keys_of_the_environment_are_shown_and_left_alone(admin: Admin) -> None:
    row = (await admin.ask("GET", f"{KEYS}/env:conf")).json()
    assert (row["id"], row["origin"], row["status"]) == ("env:conf", "environment", "active")
    assert row in (await admin.ask("GET")).json()["rows"]
    assert (await admin.ask("GET", f"{KEYS}/env%3Aconf")).json() == row
    for method, path in (("PATCH", "env:conf"), ("DELETE", "env:conf"), ("POST", "env:conf/rotate")):
        answer = await admin.ask(method, f"{KEYS}/{path}", {"group": "x"} if method == "PATCH" else None)
        assert (answer.status, answer.error["code"]) == (409, "key_conflict")


async def test_a_full_disk_is_told_and_nothing_changes(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = (await admin.ask("GET")).json()
    monkeypatch.setattr("gateway.identity.keyfile._write", full)
    for method, path, body in (("POST", KEYS, {"name": "x"}), ("DELETE", f"{KEYS}/{admin.id}", None)):
        answer = await admin.ask(method, path, body)
        assert (answer.status, answer.error["code"]) == (503, "keys_not_stored")
    monkeypatch.undo()
    assert (await admin.ask("GET")).json() == before


# -- what it refuses ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, Any, int, str, str | None]] = [
    ("POST", KEYS, b"", 400, "invalid_json", None),
    ("POST", KEYS, b"{", 400, "invalid_json", None),
    ("POST", KEYS, [], 400, "invalid_field", None),
    ("POST", KEYS, {}, 400, "invalid_field", "name"),
    ("POST", KEYS, {"name": "x", "nmae": 1}, 400, "invalid_field", "nmae"),
    ("POST", KEYS, {"name": "x", "id": "chosen"}, 400, "invalid_field", "id"),
    ("POST", KEYS, {"name": "x", "role": ["admin"]}, 400, "invalid_field", "role"),
    ("POST", KEYS, {"name": "x", "budget": {"amount": 1, "period": "year"}}, 400, "invalid_field", "budget.period"),
    ("POST", KEYS, {"name": "client"}, 400, "invalid_field", "name"),
    ("POST", KEYS, {"name": "x", "metadata": {"a": "x" * 300_000}}, 413, "request_too_large", None),
    ("PATCH", KEYS + "/{id}", {}, 400, "invalid_field", None),
    ("PATCH", KEYS + "/{id}", {"revision": 1}, 400, "invalid_field", "revision"),
    ("PATCH", KEYS + "/aaaaaaaaaa", {"group": "x"}, 404, "key_not_found", None),
    ("DELETE", KEYS + "/{id}", {"why": 1}, 400, "invalid_request", None),
    ("DELETE", KEYS + "/aaaaaaaaaa", None, 404, "key_not_found", None),
    ("POST", KEYS + "/{id}/rotate", {"overlap": "soon"}, 400, "invalid_field", "overlap"),
    ("POST", KEYS + "/{id}/rotate", {"overlp": "1h"}, 400, "invalid_field", "overlp"),
    ("POST", KEYS + "/{id}/rotate", [], 400, "invalid_field", None),
    ("POST", KEYS + "/aaaaaaaaaa/rotate", None, 404, "key_not_found", None),
    ("GET", KEYS + "/aaaaaaaaaa", None, 404, "key_not_found", None),
    ("GET", KEYS + "/", None, 404, "unknown_path", None),
    ("GET", KEYS + "/{id}/", None, 404, "unknown_path", None),
    ("GET", KEYS + "/{id}/other", None, 404, "unknown_path", None),
    ("GET", KEYS + "/{id}/rotate/x", None, 404, "unknown_path", None),
    ("GET", KEYS + "//rotate", None, 404, "unknown_path", None),
    ("PUT", KEYS, {}, 405, "method_not_allowed", None),
    ("GET", KEYS + "/{id}/rotate", None, 405, "method_not_allowed", None),
    ("POST", KEYS + "/{id}", {}, 405, "method_not_allowed", None),
]


async def test_refusals(admin: Admin) -> None:
    before = (await admin.ask("GET")).json()
    for method, path, body, status, code, param in REFUSED:
        answer = await admin.ask(method, path.replace("{id}", admin.id), body)
        if "//" in path:  # refused as a target before anybody looks for a route
            assert answer.status in (400, 404)
            continue
        assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, param), (
            method,
            path,
            body,
        )
    assert (await admin.ask("GET")).json() == before


async def test_the_nearest_name_is_told(admin: Admin) -> None:
    answer = await admin.ask("POST", KEYS, {"name": "x", "buget": None})
    assert answer.error["message"].startswith(
        "`buget` is no field of a key; did you mean 'budget'? Valid: name, group,"
    )


# -- who may --------------------------------------------------------------------------------------------------------


async def test_every_route_under_admin_names_a_role_and_refuses_who_lacks_it(admin: Admin) -> None:
    here = admin.here
    routes = [
        (method, path, handler)
        for path, methods in here.app._routes().items()
        for method, handler in methods.items()
        if path.startswith("/admin")
    ]
    assert len(routes) >= 6
    for method, path, handler in routes:
        assert isinstance(handler, Guarded), (method, path)
        assert handler.role in ROLES
        target = path.replace("{id}", admin.id)
        body = {} if method in ("POST", "PATCH") else None
        for key, status in ((here.key, 403), (ENV_KEY, 403), (None, 401), ("wrong", 401)):
            answer = await here.ask(method, target, body, key=key)
            assert answer.status == status, (method, path, key)
            if status == 403 and method != "HEAD":
                assert answer.error["code"] == "role_required"
    guarded = {path for _, path, _ in routes}
    elsewhere = {p for p, methods in here.app._routes().items() for h in methods.values() if isinstance(h, Guarded)}
    assert elsewhere == guarded


async def test_a_role_that_is_taken_away_is_gone_with_the_next_request(admin: Admin) -> None:
    other = await admin.create(name="second", roles=["admin"])
    assert (await admin.here.ask("GET", KEYS, key=other["key"])).status == 200
    await admin.ask("PATCH", f"{KEYS}/{other['id']}", {"roles": []})
    assert (await admin.here.ask("GET", KEYS, key=other["key"])).status == 403


async def test_who_sets_limits_is_not_shut_out_by_them(tmp_path: Path) -> None:
    limit = Limit("all", "global", "requests", 1, 0.001)
    async with SimServer() as sim, gateway(provider("one", sim.url), data_dir=tmp_path, limits=(limit,)) as here:
        admin = Admin(here)
        assert [(await here.ask("GET", "/v1/models")).status for _ in range(2)] == [200, 429]
        assert (await admin.ask("GET")).status == 200
        assert (await admin.ask("GET", f"{KEYS}/{admin.id}")).status == 200


# -- what nobody learns ---------------------------------------------------------------------------------------------


async def test_the_text_of_a_key_is_in_one_answer_and_nowhere_else(
    admin: Admin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    made = await admin.create(name="canary")
    texts = [made["key"], (await admin.ask("POST", f"{KEYS}/{made['id']}/rotate")).json()["key"]]
    seen: list[str] = []
    for text in texts:
        for method, path, body in (
            ("GET", KEYS, None),
            ("GET", f"{KEYS}/{made['id']}", None),
            ("PATCH", f"{KEYS}/{made['id']}", {"group": "g"}),
            ("GET", f"{KEYS}/{text}", None),  # pasted where the id belongs
            ("PATCH", f"{KEYS}/{made['id']}", {text: 1}),
            ("PATCH", f"{KEYS}/{made['id']}", {"name": text}),
            ("POST", KEYS, {"name": "x", "roles": [text]}),
            ("POST", KEYS, {"name": "x", "limits": [{text: 1}]}),
        ):
            answer = await admin.ask(method, path, body)
            if text not in str(body):  # an unknown field is named: the caller's own words
                seen.append(repr(answer))
        mistyped = (text[:-1] + "~", text + text, text[:40])
        seen += [repr(await admin.here.ask("GET", "/v1/models", key=one)) for one in mistyped]
        seen.append(repr(await admin.here.ask("GET", KEYS, key=text)))
        seen.append(repr(await admin.here.ask("POST", CHAT, chat("nonesuch"), key=text)))
        seen.append(repr(await admin.here.ask("POST", CHAT, chat("sim", max_tokens=1), key=text)))
    await admin.ask("DELETE", f"{KEYS}/{made['id']}")
    seen += [await admin.here.scrape(), admin.here.log_text(), caplog.text, repr(admin.here.records)]
    seen += [repr(admin.here.app.keys.ring), repr(admin.here.app.keys.ring.records)]
    seen += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for text in texts:
        secret = text.split("_")[2][:20]
        assert [one for one in seen if secret in one] == []


async def test_routes_are_counted_by_template_and_ids_are_no_label(admin: Admin) -> None:
    made = await admin.create(name="ci")
    await admin.ask("GET", f"{KEYS}/{made['id']}")
    await admin.ask("GET", f"{KEYS}/nonesuch")
    text = await admin.here.scrape()
    assert f'gateway_requests_total{{route="{KEYS}/{{id}}",status="200"}} 1.0' in text
    assert f'gateway_requests_total{{route="{KEYS}/{{id}}",status="404"}} 1.0' in text
    assert made["id"] not in text


# -- the second gateway ---------------------------------------------------------------------------------------------


async def followed(admin: Admin, other: Gateway, within_s: float = 5.0) -> None:
    """A key that is made at one gateway works at the other, and no more when it is revoked."""
    made = await admin.create(name="ci")
    for expected in (200, 401):
        async with asyncio.timeout(within_s):
            while (await other.ask("GET", "/v1/models", key=made["key"])).status != expected:
                await asyncio.sleep(0.05)
        await admin.ask("DELETE", f"{KEYS}/{made['id']}")


async def test_a_second_gateway_on_the_same_directory_follows(admin: Admin, tmp_path: Path) -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), data_dir=tmp_path, auth_failures_per_min=0) as other,
    ):
        await followed(admin, other)


async def test_a_second_gateway_on_the_same_store_follows(tmp_path: Path, valkey_server: Server) -> None:
    shared: dict[str, Any] = {"auth_failures_per_min": 0, "store": "auto", "redis_url": Secret(valkey_server.url)}
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), data_dir=tmp_path / "1", **shared) as here,
        gateway(provider("one", sim.url), data_dir=tmp_path / "2", **shared) as other,
    ):
        await followed(Admin(here), other)
