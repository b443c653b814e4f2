"""Where a request goes, over real sockets: conversations, bursts, policies, sessions; and whose cache is whose."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.config import Model
from gateway.sim import Engine, SimServer
from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    LAST_CHUNK,
    SSE_HEAD,
    Gateway,
    Scripted,
    chat,
    event,
    framed,
    gateway,
    provider,
    until,
)
from tests.replay import Seen

#: about 3,000 tokens
LONG = "The bees were moved to the upper field before the clover opened. " * 200


@pytest.fixture
async def sims() -> AsyncIterator[list[SimServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SimServer(models=("sim", "deep"))) for _ in range(4)]


def fleet(sims: list[SimServer], **more: Any) -> Any:
    return provider("fleet", *(sim.url for sim in sims), **more)


def counts(sims: list[SimServer]) -> list[int]:
    return [sum(one.method == "POST" for one in sim.requests) for sim in sims]


def sent(sims: list[SimServer]) -> list[dict[str, Any]]:
    return [one.json() for sim in sims for one in sim.requests if one.method == "POST"]


async def turn(here: Gateway, messages: list[dict[str, str]], **more: Any) -> str:
    """Ask, and add the answer to the conversation."""
    answer = await here.ask("POST", CHAT, {"model": "sim", "max_tokens": 20, **more, "messages": messages})
    assert answer.status == 200
    text: str = answer.json()["choices"][0]["message"]["content"]
    messages.append({"role": "assistant", "content": text})
    return here.record.upstream


async def test_conversations_stay_where_they_are_warm(sims: list[SimServer]) -> None:
    async with gateway(fleet(sims)) as here:
        talks = [[{"role": "user", "content": f"talk {n}: {LONG}"}] for n in range(8)]
        places: list[set[str]] = [set() for _ in talks]
        for number in range(4):
            for place, messages in zip(places, talks, strict=True):
                # A client may write its fields in any order, and other ones each time.
                place.add(await turn(here, messages, temperature=number / 10))
                record = here.record
                assert record.route_reason == ("warm" if number else "cold")
                assert record.ttft_predicted_s is not None
                if number:
                    assert record.believed_cached_tokens > 0.8 * 3000
                    assert record.cached_tokens > 0.8 * record.prompt_tokens
                messages.append({"role": "user", "content": f"question {number}"})
        assert [len(place) for place in places] == [1] * 8
        assert counts(sims) == [8] * 4
        here.assert_idle()


async def test_tools_come_before_messages_wherever_they_stand(sims: list[SimServer]) -> None:
    """The model reads them first: a prompt with other tools is another prompt from its beginning on."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [{"role": "user", "content": LONG}]
    async with gateway(fleet(sims)) as here:
        for body in (
            {"model": "sim", "max_tokens": 1, "messages": messages, "tools": tools},
            {"tools": tools, "model": "sim", "messages": messages, "max_tokens": 1},
            {"model": "sim", "max_tokens": 1, "messages": messages},
        ):
            assert (await here.ask("POST", CHAT, body)).status == 200
        first, same, other = here.records
        assert (first.route_reason, same.route_reason, other.route_reason) == ("cold", "warm", "cold")
        assert same.upstream == first.upstream


async def test_a_burst_on_idle_engines_spreads_evenly() -> None:
    """R1, with one and the same prompt: the hardest case for a policy that looks at prefixes."""
    all_are_there = asyncio.Event()

    async def script(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await all_are_there.wait()
        writer.write(SSE_HEAD + framed(event()) + framed(FINISH + DONE) + LAST_CHUNK)

    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Scripted(script)) for _ in range(8)]
        here = await stack.enter_async_context(gateway(provider("fleet", *(engine.url for engine in engines))))
        asked = [asyncio.create_task(here.ask("POST", CHAT, chat(stream=True))) for _ in range(64)]
        await until(lambda: sum(len(engine.seen) for engine in engines) == 64, what="64 requests")
        assert all(7 <= one.in_flight <= 9 for one in here.app.catalog.upstreams)
        assert all(7 <= len(engine.seen) <= 9 for engine in engines)
        all_are_there.set()
        assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
        here.assert_idle()


async def test_a_shared_system_prompt_does_not_pull_all_to_one(sims: list[SimServer]) -> None:
    """R2."""
    for sim in sims:
        sim.faults = {"first_token_s": 0.05}
    async with gateway(fleet(sims)) as here:

        async def ask(number: int) -> None:
            messages = [{"role": "system", "content": LONG}, {"role": "user", "content": f"question {number}"}]
            await asyncio.sleep(number * 0.005)
            assert (await here.ask("POST", CHAT, chat(max_tokens=2) | {"messages": messages})).status == 200

        await asyncio.gather(*map(ask, range(160)))
        assert sum(counts(sims)) == 160
        assert max(counts(sims)) <= 1.25 * 160 / 4


async def test_the_prefill_part_of_the_load_ends_with_the_first_content(sims: list[SimServer]) -> None:
    sims[0].faults = {"first_token_s": 0.2, "token_s": 0.1}
    async with gateway(fleet(sims[:1]), provider("other", sims[1].url)) as here:
        first, second = here.app.catalog.upstreams
        for _ in range(2):  # both are known to be as fast as each other
            await here.ask("POST", CHAT, chat(max_tokens=1))
        asked = asyncio.create_task(here.ask("POST", CHAT, chat(stream=True, max_tokens=10)))
        await until(lambda: first.in_flight + second.in_flight == 1, what="a lease")
        busy = first if first.in_flight else second
        if busy is first:
            assert busy.load.prefill_tokens > 0
            await until(lambda: busy.load.prefill_tokens == 0, what="the first content")
            assert busy.in_flight == 1
        assert (await asked).status == 200
        assert (busy.in_flight, busy.load.prefill_tokens) == (0, 0)


async def test_an_engine_that_forgot_is_found_out(sims: list[SimServer]) -> None:
    """It reports fewer cached tokens than believed: what is older than that is forgotten here, too."""
    async with gateway(fleet(sims[:2])) as here:
        talks = [[{"role": "user", "content": f"talk {n}: {LONG}"}] for n in range(4)]
        for _ in range(2):
            for messages in talks:
                await turn(here, messages)
                messages.append({"role": "user", "content": "go on"})
        at = next(n for n, one in enumerate(here.app.catalog.upstreams) if one.name == here.record.upstream)
        held = len(here.app.catalog.upstreams[at].load.index)
        sims[at].engine = Engine()  # started anew, at the same address
        await turn(here, talks[-1])
        assert here.record.route_reason == "warm"
        assert here.record.cached_tokens == 0
        assert len(here.app.catalog.upstreams[at].load.index) < 0.7 * held


async def test_one_upstream_is_not_asked_about(sims: list[SimServer]) -> None:
    async with gateway(fleet(sims[:1])) as here:
        for _ in range(2):
            assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200
        assert here.record.route_reason == "only"
        assert here.record.ttft_predicted_s is None
        assert len(here.app.catalog.upstreams[0].load.index) == 0


async def test_the_policy_is_a_setting_and_a_models_own(sims: list[SimServer]) -> None:
    models = [Model("sim", "Sim"), Model("deep", "Deep", policy="session")]
    async with gateway(fleet(sims, models=models), policy="round_robin") as here:
        for _ in range(8):
            await here.ask("POST", CHAT, chat(max_tokens=1))
        assert here.record.route_reason == "turn"
        assert here.record.believed_cached_tokens is None  # nothing was hashed
        assert counts(sims) == [2] * 4
        for how in ({"user": "anna"}, {"prompt_cache_key": "k"}, {}):
            places = set()
            for _ in range(6):
                headers = [] if how else [("X-Session-Id", "s-1")]
                await here.ask("POST", CHAT, chat("deep", max_tokens=1, **how), headers)
                places.add(here.record.upstream)
            assert len(places) == 1
            assert here.record.route_reason == "session"


# -- whose cache is whose -----------------------------------------------------------------------------------------


async def test_tenants_do_not_share_a_cache(sims: list[SimServer]) -> None:
    """I8: what one tenant asked, another cannot find in vLLM's cache by setting a salt, or none."""
    keyed: dict[str, dict[str, Any]] = {"a1": {"group": "a"}, "a2": {"group": "a"}, "b": {"group": "b"}, "c": {}}
    async with gateway(fleet(sims), keyed=keyed, cache_salt="group") as here:
        salts: dict[str, str] = {}
        for key in ("a1", "a2", "b", "c", "client"):
            for stream in (False, True):
                for more in ({}, {"cache_salt": "mine"}):
                    for sim in sims:
                        sim.requests.clear()
                    body = chat(max_tokens=1, stream=stream, **more)
                    assert (await here.ask("POST", CHAT, body, key=here.keys[key])).status == 200
                    (asked,) = sent(sims)
                    assert salts.setdefault(key, asked["cache_salt"]) == asked["cache_salt"]
        assert "mine" not in salts.values()
        assert salts["a1"] == salts["a2"]
        assert len(set(salts.values())) == 4
        assert not any(name in salt for name in ("a", "b", "c") for salt in salts.values() if salt == name)


async def test_each_key_may_be_a_tenant_and_off_leaves_bodies_alone(sims: list[SimServer]) -> None:
    keyed: dict[str, dict[str, Any]] = {"a1": {"group": "a"}, "a2": {"group": "a"}}
    async with gateway(fleet(sims), keyed=keyed, cache_salt="key") as here:
        for key in keyed:
            await here.ask("POST", CHAT, chat(max_tokens=1), key=here.keys[key])
        one, other = sent(sims)
        assert one["cache_salt"] != other["cache_salt"]
    for sim in sims:
        sim.requests.clear()
    async with gateway(fleet(sims), cache_salt="off") as here:
        raw = json.dumps(chat(max_tokens=1, cache_salt="mine")).encode()
        await here.ask("POST", CHAT, raw)
        assert [one.body for sim in sims for one in sim.requests if one.method == "POST"] == [raw]


async def test_a_runtime_without_salts_is_given_none(sims: list[SimServer]) -> None:
    async with gateway(fleet(sims, runtime="llamacpp"), cache_salt="group") as here:
        await here.ask("POST", CHAT, chat(max_tokens=1))
        assert "cache_salt" not in sent(sims)[0]


async def test_what_is_warm_for_one_tenant_is_not_for_another(sims: list[SimServer]) -> None:
    keyed: dict[str, dict[str, Any]] = {"a": {"group": "a"}, "b": {"group": "b"}}
    async with gateway(fleet(sims), keyed=keyed, cache_salt="group") as here:
        body = chat(max_tokens=1) | {"messages": [{"role": "user", "content": LONG}]}
        reasons = []
        for key in ("a", "a", "b", "b"):
            await here.ask("POST", CHAT, body, key=here.keys[key])
            reasons.append(here.record.route_reason)
        assert Counter(reasons) == {"cold": 2, "warm": 2}
        assert reasons == ["cold", "warm", "cold", "warm"]


async def test_what_one_tenant_asked_is_not_in_anothers_cache(sims: list[SimServer]) -> None:
    keyed: dict[str, dict[str, Any]] = {"a": {"group": "a"}, "b": {"group": "b"}}
    found = {}
    for salted in ("group", "off"):
        sims[0].engine = Engine()
        async with gateway(fleet(sims[:1]), keyed=keyed, cache_salt=salted) as here:
            body = chat(max_tokens=1) | {"messages": [{"role": "user", "content": LONG}]}
            for key in ("a", "a", "b", "b"):
                assert (await here.ask("POST", CHAT, body, key=here.keys[key])).status == 200
            found[salted] = [record.cached_tokens > 0 for record in here.records]
    assert found == {"group": [False, True, False, True], "off": [False, True, True, True]}


# -- what engines say of themselves -------------------------------------------------------------------------------


async def test_an_engine_says_how_large_its_cache_is(sims: list[SimServer]) -> None:
    sims[0].engine = Engine(blocks=3000)
    small = provider("small", sims[0].url)
    silent = provider("silent", sims[1].url)
    told = provider("told", sims[2].url, cache_tokens=70_000)
    sims[1].faults = {"status": 404, "paths": ["/metrics"]}
    async with gateway(small, silent, told) as here:
        tokens = [one.load.index.capacity_tokens for one in here.app.catalog.upstreams]
        assert tokens == [48_000, 1_000_000, 70_000]


async def test_routing_needs_no_metrics_page(sims: list[SimServer]) -> None:
    """R3: with it out of reach nothing is different but the size of the caches, which answers teach."""
    for sim in sims:
        sim.faults = {"reset": True, "paths": ["/metrics"]}
    async with gateway(fleet(sims)) as here:
        messages = [{"role": "user", "content": LONG}]
        places = {await turn(here, messages) for _ in range(3)}
        assert len(places) == 1
        assert here.record.route_reason == "warm"
        other = [{"role": "user", "content": "other " + LONG}]
        assert await turn(here, other) not in places


async def test_the_ollama_that_has_the_model_loaded_is_preferred(sims: list[SimServer]) -> None:
    async with gateway(*(provider(f"o{n}", sim.url, runtime="ollama") for n, sim in enumerate(sims))) as here:
        for upstream in here.app.catalog.upstreams:
            upstream.tells_loaded = True
        here.app.catalog.upstreams[2].loaded = frozenset({"sim"})
        for n in range(6):
            messages = [{"role": "user", "content": f"{n} {LONG}"}]
            assert await turn(here, messages) == "o2"
