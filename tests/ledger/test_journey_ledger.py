"""The ledger of a whole gateway: one record for each request, and what it says while it cannot be written."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from gateway.ledger import frames
from gateway.ledger.recovery import decode, entries, recover
from gateway.sim import SimServer
from gateway.sim.connection import Received
from gateway.sim.faults import Faults
from tests.journeys.stage import CHAT, Gateway, chat, gateway, provider, until


def kinds(gate: Gateway) -> Counter[int]:
    assert gate.app.journal is not None
    return Counter(entry.kind for entry in entries(gate.app.journal.folder))


async def test_a_mark_before_the_upstream_is_asked_and_a_record_at_the_end(tmp_path: Path) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), data_dir=tmp_path) as gate:
        sim.faults = {"silent": True}
        async with gate.connect() as client:
            client.send("POST", CHAT, chat())
            await until(lambda: any(one.method == "POST" for one in sim.requests), what="the upstream is asked")
            assert kinds(gate) == {frames.OPEN: 1}
        await gate.settled(1)
        assert kinds(gate) == {frames.OPEN: 1, frames.FINAL: 1}
        assert gate.app.journal is not None
        (record,) = recover(gate.app.journal.folder)
        assert record == gate.record
        assert record.outcome == "client_gone"


async def test_refused_requests_of_known_keys_have_a_record_strangers_have_none(tmp_path: Path) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), data_dir=tmp_path) as gate:
        assert (await gate.ask("POST", CHAT, chat("nothing"))).status == 404
        assert (await gate.ask("POST", CHAT, chat(), key="llmgw_no")).status == 401
        assert (await gate.ask("GET", "/v1/models")).status == 200
        await gate.settled(3)
        assert gate.app.journal is not None
        (record,) = recover(gate.app.journal.folder)
        assert (record.status, record.outcome, record.cost, record.prompt_tokens) == (404, "refused", None, None)


async def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), data_dir=tmp_path) as gate:
        journal = gate.app.journal
        assert journal is not None
        real = os.write

        def write(fd: int, data: bytes) -> int:
            if fd == journal._fd:
                raise OSError(28, "No space left on device")
            return real(fd, data)

        monkeypatch.setattr(os, "write", write)
        for _ in range(3):
            assert (await gate.ask("POST", CHAT, chat())).status == 200
        await gate.settled(3)
        ready = await gate.ask("GET", "/readyz")
        assert ready.status == 200, "what every gateway of a fleet may have must not take them all away"
        assert ready.json() == {
            "status": "degraded",
            "reasons": ["the journal cannot be written: No space left on device"],
        }
        scrape = await gate.scrape()
        assert "gateway_journal_held_records 3.0" in scrape
        assert "gateway_journal_lost_records_total 0.0" in scrape
        monkeypatch.undo()
        await until(lambda: not journal.failing, what="writing again")
        assert (await gate.ask("GET", "/readyz")).json() == {"status": "ok"}
        assert len(list(recover(journal.folder))) == 3


class Cutting(SimServer):
    """Each answer is cut at a byte of its own."""

    pick = random.Random(7)

    def _faults_for(self, received: Received) -> Faults:
        return Faults(cut_at_byte=self.pick.randrange(300, 7000)) if received.method == "POST" else Faults()


async def test_a_thousand_streams_cut_at_a_random_byte(tmp_path: Path) -> None:
    """One record each, with the tokens that were relayed, visible within a second."""
    count, tokens = 1000, 40
    async with Cutting() as sim, gateway(provider("one", sim.url), data_dir=tmp_path, continue_streams=False) as gate:
        relayed: dict[str, int] = {}

        async def one() -> None:
            async with gate.connect() as client:
                client.send("POST", CHAT, chat(stream=True, max_tokens=tokens))
                answer = await client.rest(await client.head())
                name = answer.header("x-request-id")
                assert name is not None
                whole = answer.body.split(b"\n\n")[:-1]
                relayed[name] = sum(b'"content":"' in event and b'"content":""' not in event for event in whole)

        seats = asyncio.Semaphore(50)

        async def seated() -> None:
            async with seats:
                await one()

        await asyncio.gather(*(seated() for _ in range(count)))
        assert gate.app.journal is not None
        folder = gate.app.journal.folder
        await until(lambda: len(gate.app.recent) == count, 1.0, "all records")
        found = [decode(entry.payload) for entry in entries(folder) if entry.kind == frames.FINAL]
        assert Counter(one.request_id for one in found) == dict.fromkeys(relayed, 1)
        cut = [record for record in found if record.outcome == "partial"]
        assert len(cut) > count * 0.9
        for record in found:
            assert record.completion_tokens is not None
            assert abs(record.completion_tokens - relayed[record.request_id]) <= 0.02 * tokens, record
            assert record.estimated == (record.outcome == "partial")
