"""Cost on the answer, in the record and in the metrics."""

from __future__ import annotations

import pytest

from gateway.config import Model, Price
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, SIM_MODEL, chat, gateway, provider

PRICED = Model(SIM_MODEL, SIM_MODEL, price=Price(input=2.0, output=8.0))
TIMED = Model(SIM_MODEL, SIM_MODEL, price=Price(gpu_second=0.5))


@pytest.mark.parametrize("stream", [False, True])
async def test_cost_of_an_answer(stream: bool) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url, models=[PRICED])) as gate:
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5, stream=stream))
        assert answer.status == 200
        (record,) = await gate.settled(1)
        assert record.prompt_tokens
        assert record.completion_tokens == 5
        assert record.cost == pytest.approx((record.prompt_tokens * 2.0 + 5 * 8.0) / 1e6)
        if stream:  # its head left before anybody knew
            assert answer.header("x-gateway-cost") is None
        else:
            told = answer.header("x-gateway-cost")
            assert told is not None
            assert float(told) == pytest.approx(record.cost, abs=1e-9)
        assert "gateway_unpriced_requests_total{" in (text := await gate.scrape())
        assert 'gen_ai_request_model="sim"} 0.0' in next(
            line for line in text.splitlines() if line.startswith("gateway_unpriced_requests_total")
        )


async def test_a_price_for_time_is_in_the_record() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url, models=[TIMED])) as gate:
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5))
        assert answer.header("x-gateway-cost") is None
        (record,) = await gate.settled(1)
        assert record.cost == pytest.approx(record.upstream_s * 0.5, abs=1e-6)
        assert record.cost


async def test_without_a_price_the_cost_is_null_and_counted() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url)) as gate:
        answer = await gate.ask("POST", CHAT, chat(max_tokens=5))
        assert answer.header("x-gateway-cost") is None
        assert (await gate.settled(1))[0].cost is None
        line = next(one for one in (await gate.scrape()).splitlines() if one.startswith("gateway_unpriced_requests_to"))
        assert line.endswith(" 1.0")
