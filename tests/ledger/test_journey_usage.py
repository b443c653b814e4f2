"""The ledger of a whole gateway with a real store, read over HTTP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gateway.config import Secret
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Gateway, chat, gateway, provider, until
from tests.ledger.test_journey_cost import PRICED
from tests.store_fixtures import Server


def admin_key(gate: Gateway) -> str:
    ring = gate.app.keys.ring
    key, record = ring.make_key("root", roles=("admin",))
    ring.load(dataclasses.replace(ring.kept, records={**ring.records, record.id: record}))
    return key


async def test_usage_over_http(tmp_path: Path, valkey_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(
            provider("one", sim.url, models=[PRICED]),
            limited={"other": frozenset({"sim"})},
            data_dir=tmp_path,
            store="auto",
            redis_url=Secret(valkey_server.url),
        ) as gate,
    ):
        for name, count in (("client", 3), ("other", 2)):
            for _ in range(count):
                assert (await gate.ask("POST", CHAT, chat(max_tokens=4), key=gate.keys[name])).status == 200
        own = await gate.ask("GET", "/v1/usage?by=key,model&since=1h", key=gate.keys["other"])
        assert own.status == 200
        (row,) = own.json()["rows"]
        assert (row["key"], row["model"], row["requests"], row["output_tokens"]) == ("other", "sim", 2, 8)
        assert row["cost"] == pytest.approx((row["input_tokens"] * 2.0 + 8 * 8.0) / 1e6)
        refused = await gate.ask("GET", "/admin/api/usage?by=key")
        assert (refused.status, refused.error["code"]) == (403, "role_required")
        assert gate.app.shipper is not None
        shipper = gate.app.shipper
        await until(lambda: shipper.shipped == 5, 1.0, "shipped")
        (row,) = (await gate.ask("GET", "/v1/usage?by=key")).json()["rows"]
        assert row["requests"] == 3, "from the store, the same"
        for query in ("by=colour", "since=soon", "colour=red", "since=2026-01-02&until=2026-01-01", "since=99999w"):
            assert (await gate.ask("GET", f"/v1/usage?{query}")).status == 400, query


async def test_the_administrator_sees_everybody(tmp_path: Path) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), data_dir=tmp_path) as gate:
        assert (await gate.ask("POST", CHAT, chat())).status == 200
        answer = await gate.ask("GET", "/admin/api/usage?by=key,upstream,day", key=admin_key(gate))
        assert answer.status == 200
        document = answer.json()
        assert document["by"] == ["key", "upstream", "day"]
        (row,) = document["rows"]
        assert (row["key"], row["upstream"], row["requests"]) == ("client", "one", 1)
        assert (row["cost"], row["unpriced"]) == (None, 1), "no price is no zero"
