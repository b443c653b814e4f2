"""A request leaves nothing that only the collector of cycles could free: it is told to look rarely (`server`)."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

from gateway.sim import SimServer
from tests.journeys.stage import CHAT, chat, gateway, provider

REQUESTS = 40


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (chat(max_tokens=5), 200),
        (chat(max_tokens=5, stream=True), 200),
        (chat("unknown"), 404),
        (b"{", 400),
        (chat("dead"), 502),
    ],
    ids=["whole", "stream", "unknown model", "no JSON", "dead upstream"],
)
async def test_no_cycles(body: object, status: int) -> None:
    async with (
        SimServer() as sim,
        gateway(provider("one", sim.url), provider("two", "http://127.0.0.1:9", models=["dead"])) as here,
        here.connect() as client,
    ):
        for _ in range(5):  # what is made once
            await client.ask("POST", CHAT, body)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(REQUESTS):
                answer = await client.ask("POST", CHAT, body)
                assert answer.status == status
            gc.collect()
            found = Counter(type(one).__qualname__ for one in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    kinds = {name: count for name, count in found.items() if count >= REQUESTS}
    assert not kinds, "one of a kind for each request"  # probes of the dead one leave a few
