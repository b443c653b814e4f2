"""`llm-gateway explain`: the whole way of a request, as the ledger has it, for programs and for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Secret
from gateway.ledger.story import explain, text
from gateway.limits.spec import Budget, Limit
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Gateway, chat, gateway, provider
from tests.ledger.test_journey_cost import PRICED
from tests.store_fixtures import Server

REQUESTS = Limit("requests", "key", "requests", 640, 1.0)
PARALLEL = Limit("parallel", "global", "concurrent", 8)
TOKENS = Limit("tokens", "key_model", "total_tokens", 4000, 1.0)
SEEN = Limit("seen", "key", "output_tokens", 1, 1.0, observe=True)


async def story_of(gate: Gateway, id: str | None) -> dict[str, object]:
    assert gate.app.journal is not None
    found = await explain(gate.app.journal.root, gate.app.store, id or "")
    assert found is not None
    return found


async def test_the_whole_way_of_a_request(tmp_path: Path, store_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(
            provider("one", sim.url, models=[PRICED]),
            data_dir=tmp_path,
            store="auto",
            redis_url=Secret(store_server.url),
            limits=(REQUESTS, PARALLEL, TOKENS, SEEN),
        ) as gate,
    ):
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5))
        assert answer.status == 200
        story = await story_of(gate, answer.header("x-request-id"))
        used = gate.record.prompt_tokens
        assert used is not None
        reserved = gate.record.request_bytes // 4 + 1 + 5
        assert story["limits"] == [
            {"name": "requests", "scope": "key", "resource": "requests", "reserved": 1, "used": 1, "source": "store"},
            {"name": "parallel", "scope": "global", "resource": "concurrent", "reserved": 1, "used": 1,
             "source": "store"},
            {"name": "tokens", "scope": "key_model", "resource": "total_tokens", "reserved": reserved,
             "used": used + 5, "source": "store"},
            {"name": "seen", "scope": "key", "resource": "output_tokens", "reserved": 1, "used": 5, "source": "store"},
        ]  # fmt: skip
        assert (story["key"], story["upstream"], story["attempts"], story["outcome"]) == ("client", "one", 1, "ok")
        told = text(story)
        for words in (
            f"{answer.header('x-request-id')}, POST {CHAT}",
            "principal  client\n",
            f"tokens (scope key_model): granted by the store; {reserved} total tokens reserved, {used + 5} used",
            "one of one",
            f"{used} tokens in (0 cached), 5 out",
            f"cost       {gate.record.cost:.10g}\n",
            "ok, status 200",
        ):
            assert words in told, told

        # The second may use the loan that the first brought along; "seen" is in debt, and only observes.
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5))
        story = await story_of(gate, answer.header("x-request-id"))
        limits = story["limits"]
        assert isinstance(limits, list)
        by_name = {one["name"]: one for one in limits}
        assert by_name["seen"] == {**by_name["seen"], "reserved": 0, "used": 5, "source": "observed"}
        assert {one["source"] for one in limits} == {"store", "observed"}

        answer = await gate.ask("POST", CHAT, chat(max_tokens=100_000))
        assert answer.status == 429
        story = await story_of(gate, answer.header("x-request-id"))
        (limit,) = story["limits"]  # type: ignore[misc]
        assert (limit["name"], limit["source"], limit["used"]) == ("tokens", "refused", 0)
        assert "tokens (scope key_model): refused; 4000 total tokens were asked for" in text(story)
        assert "none: it reached no model" in text(story)


async def test_who_granted_it(tmp_path: Path, valkey_server: Server) -> None:
    async with (
        SimServer() as sim,
        gateway(
            provider("one", sim.url),
            data_dir=tmp_path,
            store="auto",
            redis_url=Secret(valkey_server.url),
            limits=(REQUESTS,),
        ) as gate,
    ):
        sources = []
        for _ in range(3):
            await gate.ask("POST", CHAT, chat(max_tokens=1))
            sources.append([one.source for one in gate.record.limits])
        valkey_server.kill()
        while gate.app.store is not None and gate.app.store.up:
            await gate.ask("POST", CHAT, chat(max_tokens=1))
        await gate.ask("POST", CHAT, chat(max_tokens=1))
        sources.append([one.source for one in gate.record.limits])
        assert sources == [["store"], ["loan"], ["loan"], ["share"]]


async def test_a_budget_without_a_store(tmp_path: Path) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url, models=[PRICED]), data_dir=tmp_path) as gate:
        key, record = gate.app.keys.ring.make_key("spender", budget=Budget(1.0, "currency", "total"), group="team")
        gate.app.keys.ring.add(record)
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5), key=key)
        story = await story_of(gate, answer.header("x-request-id"))
        (limit,) = story["limits"]  # type: ignore[misc]
        assert (limit["name"], limit["resource"], limit["source"]) == ("budget", "currency", "share")
        assert limit["used"] == pytest.approx(gate.record.cost, abs=1e-8)
        assert limit["reserved"] > limit["used"]
        assert "spender, group team" in text(story)
