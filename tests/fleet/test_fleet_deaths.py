"""Engines that die, hang, refuse and come back, under load: R4, R5, R6, S5."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from gateway.sim import SimServer
from tests.fleet.rig import Outcome, ask_once, engines, kinds, load, pool, together, unique, upstream_of
from tests.journeys.stage import CHAT, SIM_MODEL, chat, gateway, provider, timeouts, until


def failed(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.kind != "done"]


def generations(sim: SimServer) -> int:
    return sum(sim.finished.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_dies_and_nobody_who_had_no_answer_yet_notices(stream: bool) -> None:
    """R4: what the dead engine was computing is asked of another, and it is asked nothing more within a second."""
    dice = random.Random(4)
    async with engines(4) as sims, gateway(pool(sims)) as here:
        victim = sims[1]
        for sim in sims:
            sim.faults = {"first_token_s": 0.05}  # so that there is always something unanswered
        async with load(here, 24, lambda number: unique(dice, stream=stream, max_tokens=3)) as running:
            await running.count(100)
            victim.kill()
            killed_at = asyncio.get_running_loop().time()
            upstream = upstream_of(here, victim)
            await until(lambda: upstream.breaker.state != "closed", within_s=1.0, what="the ejection")
            await running.count(200)
            asked = upstream.served
            await running.count(200)
            assert upstream.served - asked <= 2, "an ejected engine gets at most a trial"
            await victim.revive()
            revived_at = asyncio.get_running_loop().time()
            await until(lambda: generations(victim) > 0, within_s=2.0, what="its first answer after the return")
            await running.count(50)
        assert not failed(running.outcomes), failed(running.outcomes)[:3]
        assert any(outcome.began_at < killed_at < outcome.began_at + outcome.took_s for outcome in running.outcomes)
        assert revived_at > killed_at
        here.assert_idle()


async def test_an_engine_that_dies_with_half_of_all_requests_loses_none() -> None:
    """R4: at the worst moment, before any budget for retries has been saved."""
    dice = random.Random(44)
    async with engines(2) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.faults = {"first_token_s": 1.0}

        async def kill() -> None:
            await until(lambda: sum(sim.engine.running for sim in sims) == 120, what="all of them at work")
            sims[0].kill()

        outcomes, _ = await asyncio.gather(together(here, [unique(dice, max_tokens=2) for _ in range(120)]), kill())
        assert kinds(outcomes) == {"done": 120}, failed(outcomes)[:2]
        assert generations(sims[1]) == 120
        here.assert_idle()


async def test_the_last_engine_is_asked_until_it_answers() -> None:
    """R4: nobody ejects the only one there is; it answers the first request after its return."""
    async with engines(1) as sims, gateway(pool(sims)) as here:
        sims[0].kill()
        for _ in range(10):
            outcome = await ask_once(here, chat(max_tokens=1))
            assert outcome.kind in ("502", "503"), outcome
            assert outcome.header("Retry-After") is None or outcome.kind == "503"
        await sims[0].revive()
        assert (await ask_once(here, chat(max_tokens=1))).kind == "done"


async def test_a_fleet_that_was_gone_altogether_serves_within_two_seconds() -> None:
    """R4, for all of them: the panic threshold leaves nobody waiting for a timer."""
    async with engines(4) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.kill()
        outcomes = [await ask_once(here, chat(max_tokens=1)) for _ in range(20)]
        assert set(kinds(outcomes)) <= {"502", "503"}
        for sim in sims:
            await sim.revive()
        assert (await ask_once(here, chat(max_tokens=1))).kind == "done"


async def test_the_engines_word_about_a_request_ejects_nobody() -> None:
    """R4: a 4xx is the client's own, and is not tried elsewhere."""
    async with engines(2) as sims, gateway(pool(sims)) as here:
        bad = {"model": SIM_MODEL, "messages": []}
        outcomes = [await ask_once(here, bad) for _ in range(40)]
        assert kinds(outcomes) == {"400": 40}
        assert sum(sim.requests_total for sim in sims) - probes(sims) == 40
        assert all(one.breaker.clear for one in here.app.catalog.upstreams)
        assert (await ask_once(here, chat(max_tokens=1))).kind == "done"


def probes(sims: list[SimServer]) -> int:
    return sum(1 for sim in sims for request in sim.requests if request.method == "GET")


async def test_a_busy_engine_is_left_alone_for_as_long_as_it_asks_and_not_blamed() -> None:
    """R4, R6: 429 fails over and is neutral; `Retry-After` is obeyed."""
    async with engines(2) as sims, gateway(pool(sims)) as here:
        busy, free = sims
        busy.faults = {"status": 429, "retry_after": 1}
        outcomes = [await ask_once(here, chat(max_tokens=1)) for _ in range(30)]
        assert kinds(outcomes) == {"done": 30}
        assert generations(free) == 30
        asked = [request for request in busy.requests if request.method == "POST"]
        assert len(asked) == 1
        assert upstream_of(here, busy).breaker.clear
        busy.faults = {}

        async def answered() -> bool:
            await ask_once(here, chat(max_tokens=1))
            return generations(busy) > 0

        loop = asyncio.get_running_loop()
        began = loop.time()
        while not await answered():
            assert loop.time() - began < 3
            await asyncio.sleep(0.05)


async def test_when_all_are_busy_the_client_is_told_when_to_come_back() -> None:
    async with engines(3) as sims, gateway(pool(sims)) as here:
        for sim in sims:
            sim.faults = {"status": 503, "retry_after": 7}
        outcome = await ask_once(here, chat(max_tokens=1))
        assert outcome.kind == "503"
        after = outcome.header("Retry-After")
        assert after is not None
        assert 1 <= int(after) <= 7
        assert (await ask_once(here, chat(max_tokens=1))).kind == "503"
        assert sum(1 for sim in sims for request in sim.requests if request.method == "POST") == 3, "none asked twice"


@pytest.mark.parametrize(
    "faults",
    [{"reset": True}, {"status": 500}, {"status": 503}, {"cut_at_byte": 0}, {"cut_at_token": 0}, {"silent": True}],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_before_the_first_content_is_invisible(faults: dict[str, Any], stream: bool) -> None:
    """R6, each way of failing; never more attempts than configured, and within the budget."""
    if faults == {"cut_at_byte": 0} and not stream:
        faults = {"cut_at_byte": 20}
    limits = timeouts(first_byte_s=0.3)
    async with engines(3) as sims, gateway(pool(sims, timeouts=limits)) as here:
        sims[0].faults = faults
        outcomes = [await ask_once(here, chat(max_tokens=3, stream=stream)) for _ in range(12)]
        assert kinds(outcomes) == {"done": 12}, outcomes
        records = await here.settled(12)
        assert all(1 <= record.attempts <= here.app.dispatcher.attempts for record in records)
        assert any(record.attempts == 2 for record in records), "the broken one was asked"
        assert {record.completion_tokens for record in records} == {3}
        here.assert_idle()


async def test_attempts_have_a_limit_and_retries_a_budget() -> None:
    """R6: all engines fail; a storm of requests is not multiplied."""
    count = 400
    async with engines(4) as sims, gateway(pool(sims), attempts=3, retry_budget=0.1) as here:
        for sim in sims:
            sim.faults = {"status": 500}
        outcomes = [outcome for _ in range(20) for outcome in await together(here, [chat(max_tokens=1)] * 20)]
        assert set(kinds(outcomes)) <= {"500", "502", "503"}
        assert len(outcomes) == count
        asked = sum(1 for sim in sims for request in sim.requests if request.method == "POST")
        seconds = max(outcome.began_at + outcome.took_s for outcome in outcomes) - outcomes[0].began_at
        assert asked <= count * 1.1 + 10 + seconds + 1, "the budget, its reserve, and what that gets back each second"
        records = await here.settled(count)
        assert max(record.attempts for record in records) <= 3


async def test_after_the_first_content_nothing_is_replayed() -> None:
    """R6, S5: what the client has seen is not said twice; where the answer cannot go on it ends in an error event."""
    dice = random.Random(6)
    async with engines(3) as sims, gateway(pool(sims)) as here:
        expected: dict[str, str] = {}
        for number in range(30):
            body = unique(dice, stream=True, max_tokens=12)
            plain = await ask_once(here, body)
            prompt = body["messages"][0]["content"]
            expected[prompt] = plain.text
            broken = await ask_once(here, {**body, "sim": {"cut_at_token": 1 + number % 10}})
            if broken.kind == "done":
                assert broken.text == expected[prompt]
            else:
                assert broken.whole
                assert "error" in broken.events[-1]
                assert b"[DONE]" not in broken.body
                assert expected[prompt].startswith(broken.text)
        here.assert_idle()


@pytest.mark.parametrize("fault", ["error_event_at_token", "cut_at_token", "clean_cut_at_token", "kill_at_token"])
async def test_what_fails_behind_the_finish_takes_nothing_from_the_answer(fault: str) -> None:
    async with engines(2) as sims, gateway(pool(sims)) as here:
        body = chat(stream=True, max_tokens=5)
        whole = await ask_once(here, body)
        outcome = await ask_once(here, {**body, "sim": {fault: 5}})
        assert outcome.whole
        assert outcome.text == whole.text
        assert b'"error"' not in outcome.body
        _, second = await here.settled(2)
        assert (second.outcome, second.error, second.completion_tokens) == ("ok", None, 5)
        here.assert_idle()


async def test_one_black_hole_of_eight_does_not_slow_the_others() -> None:
    """R5, as a test can have it: every answer comes, and after the first few none waits for the hole.
    The figure in milliseconds is `python -m tests.bench fleet`'s.
    """
    dice = random.Random(5)
    limits = timeouts(connect_s=1.0, first_byte_s=1.0)
    async with engines(8) as sims, gateway(pool(sims, timeouts=limits)) as here:
        async with load(here, 16, lambda number: unique(dice, max_tokens=1)) as running:
            await running.count(100)
            sims[3].faults = {"black_hole": True}
            await running.count(300)
            began = asyncio.get_running_loop().time()
            await running.count(1500)
        assert not failed(running.outcomes), failed(running.outcomes)[:3]
        late = sorted(outcome.took_s for outcome in running.since(began))
        assert late[int(len(late) * 0.99)] < 0.9, "who comes later does not wait for a timeout"
        here.assert_idle()


@pytest.mark.slow
async def test_what_waits_on_a_host_without_power_is_asked_of_another() -> None:
    """No reset ever comes, and the time for a first byte is ten minutes: only the probes can tell."""
    dice = random.Random(12)
    async with engines(3) as sims, gateway(pool(sims)) as here:
        here.app.control.timeout_s = 0.2
        sims[0].faults = {"silent": True, "paths": ["/"]}
        for sim in sims[1:]:
            sim.faults = {"first_token_s": 6.0}
        waiting = asyncio.gather(*(ask_once(here, unique(dice, max_tokens=2, stream=n % 2 == 0)) for n in range(9)))
        await until(lambda: all(upstream_of(here, sim).in_flight == 3 for sim in sims), what="three on each")
        here.app.prober.doubt(upstream_of(here, sims[0]))
        await until(lambda: upstream_of(here, sims[0]).in_flight == 0, within_s=15, what="those on the dead host to go")
        assert sum(upstream_of(here, sim).in_flight for sim in sims[1:]) == 9, "who answers probes is waited for"
        outcomes = await waiting
        assert kinds(outcomes) == {"done": 9}, failed(outcomes)[:2]
        assert sum(generations(sim) for sim in sims) == 9
        here.assert_idle()


@pytest.mark.slow
async def test_the_only_host_is_waited_for_though_it_answers_no_probe() -> None:
    async with engines(1) as sims, gateway(pool(sims)) as here:
        here.app.control.timeout_s = 0.1
        sims[0].faults = {"slow_headers_s": 5.0, "paths": ["/"]}
        asked = asyncio.gather(ask_once(here, chat(max_tokens=2)))
        await until(lambda: upstream_of(here, sims[0]).in_flight == 1)
        here.app.prober.doubt(upstream_of(here, sims[0]))
        await until(lambda: upstream_of(here, sims[0]).breaker.gone, what="the probes' verdict")
        assert kinds(await asked) == {"done": 1}


async def test_an_engine_is_seen_back_while_another_says_nothing() -> None:
    """R4: a probe that waits for its timeout holds up no other."""
    async with engines(3) as sims, gateway(pool(sims)) as here:
        here.app.control.timeout_s = 30.0
        sims[0].faults = {"silent": True, "paths": ["/"]}
        silent, victim = upstream_of(here, sims[0]), upstream_of(here, sims[1])
        here.app.prober.doubt(silent)
        await until(lambda: any(request.method == "GET" for request in list(sims[0].requests)[2:]), what="its probe")
        sims[1].kill()
        here.app.prober.doubt(victim)
        await until(lambda: victim.breaker.gone, within_s=2.0, what="the ejection")
        await sims[1].revive()
        await until(lambda: victim.breaker.state == "closed", within_s=2.0, what="its return")


@pytest.mark.timeout(120)
async def test_flapping_engines_are_seldom_asked_and_never_felt() -> None:
    """An engine that dies of the first request it gets, again and again, beside three that are well."""
    dice = random.Random(7)
    async with engines(4) as sims, gateway(pool(sims)) as here:
        flapping = sims[0]
        flapping.faults = {"kill_at_token": 0, "down_s": 0.3}
        async with load(here, 12, lambda number: unique(dice, stream=number % 2 == 0, max_tokens=2)) as running:
            loop = asyncio.get_running_loop()
            began = loop.time()
            while loop.time() - began < 6:
                await running.count(50)
        assert not failed(running.outcomes), failed(running.outcomes)[:3]
        upstream = upstream_of(here, flapping)
        assert upstream.breaker.opened >= 2, "it died more than once"
        assert upstream.served < 0.1 * len(running.outcomes)
        here.assert_idle()


async def test_a_slow_engine_gets_less_to_do() -> None:
    dice = random.Random(9)
    async with engines(3) as sims, gateway(pool(sims)) as here:
        for sim, delay_s in zip(sims, (0.02, 0.02, 0.2), strict=True):
            sim.faults = {"first_token_s": delay_s}
        async with load(here, 12, lambda number: unique(dice, max_tokens=1)) as running:
            await running.count(300)
        fast, other, slow = (upstream_of(here, sim).served for sim in sims)
        assert slow < 0.5 * min(fast, other), (fast, other, slow)


async def test_a_fleet_of_several_runtimes() -> None:
    """vLLM's way and llama.cpp's side by side, one of each dying: everything is answered whole."""
    dice = random.Random(10)
    async with engines(2) as vllm, engines(2, runtime="llamacpp") as llama:
        providers = (pool(vllm), provider("llama", *(sim.url for sim in llama), runtime="llamacpp"))
        async with gateway(*providers) as here:
            async with load(here, 12, lambda number: unique(dice, stream=number % 2 == 0, max_tokens=3)) as running:
                await running.count(100)
                for dying in (vllm[0], llama[0]):
                    dying.faults = {"kill_at_token": 0}
                await running.count(300)
                for dying in (vllm[0], llama[0]):
                    dying.faults = {}
                    await dying.revive()
                await running.count(100)
            assert not failed(running.outcomes), failed(running.outcomes)[:3]
            records = here.records
            assert {record.completion_tokens for record in records} == {3}
            assert {record.provider for record in records} == {"fleet", "llama"}
            assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200
            here.assert_idle()
