"""Which upstream answers: pools of one model, aliases, named providers, dead hosts, models without tools."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.config import Model
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Scripted, chat, gateway, provider, until, whole

LOCAL = "/api/local-llm/proxy"
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
}


@pytest.fixture
async def sims() -> AsyncIterator[tuple[SimServer, SimServer]]:
    async with SimServer(models=("sim", "deep")) as one, SimServer(models=("sim", "deep")) as two:
        yield one, two


def posts(sim: SimServer) -> list[Any]:
    return [one for one in sim.requests if one.method == "POST"]


async def dead_url() -> str:
    """An address that refuses connections."""
    async with Scripted() as gone:
        return gone.url


async def test_simultaneous_arrivals_are_spread_evenly(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    for sim in sims:
        sim.faults = {"first_token_s": 1.0}  # all must be there before the first ends
    async with gateway(provider("one", one.url), provider("two", two.url)) as here:
        asked = [asyncio.create_task(here.ask("POST", CHAT, chat(max_tokens=2))) for _ in range(64)]
        first, second = here.app.catalog.upstreams
        await until(lambda: first.in_flight + second.in_flight == 64, what="64 leases")
        assert (first.in_flight, second.in_flight) == (32, 32)
        answers = await asyncio.gather(*asked)
        assert {answer.status for answer in answers} == {200}
        assert (len(posts(one)), len(posts(two))) == (32, 32)
        assert Counter(record.provider for record in here.records) == {"one": 32, "two": 32}
        here.assert_idle()


async def test_load_counts_and_not_what_was_served(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    async with gateway(provider("one", one.url), provider("two", two.url)) as here:
        for _ in range(10):
            await here.ask("POST", LOCAL, {**chat(max_tokens=1), "provider": "two"})
        for sim in sims:
            sim.faults = {"first_token_s": 0.2}
        held = [
            asyncio.create_task(here.ask("POST", LOCAL, {**chat(max_tokens=1), "provider": "one"})) for _ in range(3)
        ]
        first, second = here.app.catalog.upstreams
        await until(lambda: first.in_flight == 3, what="three held")
        held += [asyncio.create_task(here.ask("POST", CHAT, chat(max_tokens=1))) for _ in range(3)]
        await until(lambda: first.in_flight + second.in_flight == 6, what="six held")
        assert (first.in_flight, second.in_flight) == (3, 3)
        await asyncio.gather(*held)


async def test_one_after_the_other_they_take_turns(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    async with gateway(provider("one", one.url), provider("two", two.url)) as here:
        for _ in range(10):
            await here.ask("POST", CHAT, chat(max_tokens=1))
        assert (len(posts(one)), len(posts(two))) == (5, 5)


async def test_several_hosts_of_one_provider_are_a_pool(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    async with gateway(provider("fleet", one.url, two.url)) as here:
        for _ in range(10):
            await here.ask("POST", CHAT, chat(max_tokens=1))
        assert (len(posts(one)), len(posts(two))) == (5, 5)
        assert len({record.upstream for record in here.records}) == 2
        assert {record.provider for record in here.records} == {"fleet"}


async def test_a_host_whose_probe_failed_is_not_asked(sims: tuple[SimServer, SimServer]) -> None:
    one, _ = sims
    async with gateway(provider("dead", await dead_url()), provider("alive", one.url)) as here:
        answers = [await here.ask("POST", CHAT, chat(max_tokens=1)) for _ in range(6)]
        assert {answer.status for answer in answers} == {200}
        assert {(record.provider, record.attempts) for record in here.records} == {("alive", 1)}


async def test_a_host_that_refuses_is_skipped(sims: tuple[SimServer, SimServer]) -> None:
    """It dies right after its probe: the next one is asked, and the client does not notice."""
    one, _ = sims
    async with Scripted() as dying:
        ready = gateway(provider("dying", dying.url), provider("alive", one.url))
        here = await ready.__aenter__()
    try:
        answers = [await here.ask("POST", CHAT, chat(max_tokens=1)) for _ in range(6)]
        assert {answer.status for answer in answers} == {200}
        assert {record.provider for record in here.records} == {"alive"}
        assert 2 in {record.attempts for record in here.records}
        assert here.app.dispatcher.retries >= 1
        assert f"gateway_upstream_retries_total {float(here.app.dispatcher.retries)}" in await here.scrape()
        here.assert_idle()
    finally:
        await ready.__aexit__(None, None, None)


async def test_when_nobody_can_be_reached_the_client_hears_who_and_why() -> None:
    async with gateway(provider("north", await dead_url()), provider("south", await dead_url())) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 502
        assert answer.error["code"] == "upstream_unreachable"
        assert "north: unreachable after" in answer.error["message"]
        assert "south: unreachable after" in answer.error["message"]
        assert "refused" in answer.error["message"]
        record = here.record
        assert (record.status, record.outcome, record.attempts) == (502, "upstream_error", 4)
        assert {one.upstream for one in record.attempts_made} == {"north", "south"}
        assert {one.outcome for one in record.attempts_made} == {"unreachable"}
        assert (record.prompt_tokens, record.completion_tokens) == (None, None)
        here.assert_idle()


async def test_what_fails_unanswered_is_sent_to_another(sims: tuple[SimServer, SimServer]) -> None:
    """A prompt changes nothing where it was sent: as long as the client has seen nothing, another may answer."""
    one, two = sims
    one.faults = {"reset": True}
    async with gateway(provider("one", one.url), provider("two", two.url)) as here:
        answers = [await here.ask("POST", CHAT, chat(max_tokens=1)) for _ in range(4)]
        assert {answer.status for answer in answers} == {200}
        again = [record for record in here.records if record.attempts == 2]
        assert again
        assert [(made.upstream, made.outcome) for made in again[0].attempts_made] == [
            ("one", "no_answer"),
            ("two", "ok"),
        ]
        assert "no_answer" in here.log_text()
        here.assert_idle()


async def test_an_alias_is_written_over_and_nothing_else(sims: tuple[SimServer, SimServer]) -> None:
    one, _ = sims
    async with gateway(provider("one", one.url, models=[Model("deep", "Deep", aliases=("gpt-4o", "d"))])) as here:
        raw = b'{ "temperature":0.10, "model" : "gpt-4o" ,"messages":[{"role":"user","content":"gpt-4o?"}]}'
        answer = await here.ask("POST", CHAT, raw)
        assert answer.status == 200
        assert posts(one)[0].body == raw.replace(b'"model" : "gpt-4o"', b'"model" : "deep"')
        assert here.record.model == "deep"
        listed = (await here.ask("GET", "/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == ["deep", "gpt-4o", "d"]


async def test_a_named_provider_is_asked_and_its_name_stays_here(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    async with gateway(provider("one", one.url), provider("two", two.url)) as here:
        for _ in range(5):
            raw = b'{"provider":"two", "model":"sim","messages":[{"role":"user","content":"hi"}],"stream":false}'
            assert (await here.ask("POST", LOCAL, raw)).status == 200
        assert not posts(one)
        assert {seen.body for seen in posts(two)} == {raw.replace(b'"provider":"two", ', b"")}
        assert {record.provider for record in here.records} == {"two"}


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "words"),
    [
        ({"provider": "tow"}, 404, "provider_not_found", "provider", ["'tow'", "'one'", "'two'"]),
        ({"provider": 7}, 400, "invalid_request", "provider", ["string"]),
        ({"model": None}, 400, "invalid_request", "model", ["model", "deep", "sim"]),
        ({"model": ""}, 400, "invalid_request", "model", ["deep", "sim"]),
        ({"model": None, "provider": "two"}, 400, "invalid_request", "model", ["'two'", "sim"]),
        ({"messages": None}, 400, "invalid_request", "messages", ["messages", "deep", "sim"]),
        ({"model": "sin"}, 404, "model_not_found", "model", ["'sin'", "'sim'"]),
        ({"model": "x" * 5000}, 404, "model_not_found", "model", ["deep", "sim"]),
        ({"model": "deep", "provider": "two"}, 404, "model_not_found", "model", ["'deep'", "'two'"]),
        ({"model": 5}, 400, "invalid_type", "model", ["string"]),
        ({"stream": "yes"}, 400, "invalid_type", "stream", ["true or false"]),
    ],
)
async def test_what_cannot_be_asked_is_answered_with_what_can(
    sims: tuple[SimServer, SimServer], body: dict[str, Any], status: int, code: str, param: str, words: list[str]
) -> None:
    one, two = sims
    document = {name: value for name, value in {**chat(), **body}.items() if value is not None}
    async with gateway(provider("one", one.url, models=["sim", "deep"]), provider("two", two.url)) as here:
        answer = await here.ask("POST", LOCAL, document)
        assert answer.status == status
        assert (answer.error["code"], answer.error["param"]) == (code, param)
        for word in words:
            assert word in answer.error["message"]
        assert len(answer.error["message"]) < 600
        assert not posts(one)
        assert not posts(two)
        assert (here.record.status, here.record.outcome) == (status, "refused")


async def test_an_empty_list_of_models_names_the_key_to_set() -> None:
    async with Scripted() as upstream, gateway(provider("bare", upstream.url, models=[])) as here:
        for document in (chat(), {}, {**chat(), "provider": "bare"}):
            answer = await here.ask("POST", LOCAL, document)
            assert answer.status in (400, 404)
            assert "models" in answer.error["message"]
            assert "'bare'" in answer.error["message"]


# -- tools --------------------------------------------------------------------------------------------------------


PLAIN = Model("sim", "sim", supports_tools=False)


@pytest.mark.parametrize("path", [CHAT, LOCAL, "/api/local-llm/stream"])
async def test_tools_are_taken_out_for_a_model_without_them(path: str) -> None:
    async with (
        Scripted(answer=whole(b"{}")) as upstream,
        gateway(provider("one", upstream.url, models=[PLAIN])) as here,
    ):
        asked = {**chat(**TOOLS), "functions": [], "function_call": "none", "user": "tools"}
        answer = await here.ask("POST", path, asked)
        assert answer.status == 200
        assert answer.header("X-Gateway-Tools") == "removed"
        sent = json.loads(upstream.seen[0].body)
        assert not {"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"} & set(sent)
        assert {**sent, "stream": None, "stream_options": None} == {
            **chat(user="tools"),
            "stream": None,
            "stream_options": None,
        }
        plain = await here.ask("POST", path, chat())
        assert plain.header("X-Gateway-Tools") is None


async def test_tools_are_refused_where_that_is_configured() -> None:
    async with Scripted(answer=whole(b"{}")) as upstream:
        one = provider("one", upstream.url, models=[PLAIN])
        async with gateway(one, tools_unsupported="reject") as here:
            answer = await here.ask("POST", CHAT, chat(**TOOLS))
            assert answer.status == 400
            assert (answer.error["code"], answer.error["param"]) == ("tools_not_supported", "tools")
            assert not upstream.seen
            assert (await here.ask("POST", CHAT, chat())).status == 200


async def test_tools_go_where_they_are_supported(sims: tuple[SimServer, SimServer]) -> None:
    one, two = sims
    async with gateway(provider("plain", one.url, models=[PLAIN]), provider("able", two.url)) as here:
        for _ in range(4):
            answer = await here.ask("POST", CHAT, chat(**TOOLS))
            assert answer.header("X-Gateway-Tools") is None
        assert not posts(one)
        assert len(posts(two)) == 4
        assert posts(two)[0].body == json.dumps(chat(**TOOLS)).encode()


async def test_one_public_name_for_what_runtimes_call_differently() -> None:
    async with SimServer(models=("Qwen/Qwen3-32B",)) as vllm, SimServer(models=("qwen3:32b",)) as ollama:
        here = gateway(
            provider("vllm", vllm.url, models=[Model("Qwen/Qwen3-32B", "Qwen3", aliases=("qwen3",))]),
            provider("ollama", ollama.url, models=[Model("qwen3:32b", "Qwen3", aliases=("qwen3",))], runtime="ollama"),
        )
        async with here as one:
            answers = [await one.ask("POST", CHAT, chat("qwen3", max_tokens=1)) for _ in range(4)]
            assert {answer.status for answer in answers} == {200}
            assert {record.model for record in one.records} == {"Qwen/Qwen3-32B", "qwen3:32b"}
            assert {record.model_asked for record in one.records} == {"qwen3"}
            for sim, name in ((vllm, "Qwen/Qwen3-32B"), (ollama, "qwen3:32b")):
                assert {json.loads(one.body)["model"] for one in posts(sim)} == {name}
