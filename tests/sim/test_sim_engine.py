"""The engine model on a virtual clock."""

from __future__ import annotations

import math
import random

import pytest

from gateway.sim.engine import BlockPool, Engine, Event, Pace, Request, chain


def request(id: str, prompt: int, output: int, *, text: str = "", **options: object) -> Request:
    tokens = [f"{text or id}{n}" for n in range(prompt + output)]
    return Request(id, prompt, output, chain(tokens), **options)  # type: ignore[arg-type]


def run(engine: Engine, until: float = math.inf) -> list[tuple[float, Event]]:
    """Step until idle or `until`: every event with its time."""
    events: list[tuple[float, Event]] = []
    while (now := engine.next_at) <= until and now < math.inf:
        events += [(now, event) for event in engine.step(now)]
    return events


def test_instant_request_is_made_in_one_step() -> None:
    engine = Engine()
    engine.submit(request("a", 40, 10), 5.0)
    assert (engine.next_at, engine.waiting, engine.running) == (5.0, 1, 0)
    assert engine.step(5.0) == [Event("a", 10, True, 0)]
    assert (engine.next_at, engine.waiting, engine.running, engine.kv_usage) == (math.inf, 0, 0, 0.0)
    assert (engine.prompt_tokens_total, engine.generation_tokens_total) == (40, 10)


def test_nothing_happens_before_the_step_is_due() -> None:
    engine = Engine(speed=1.0)
    engine.submit(request("a", 10, 2), 0.0)
    assert engine.step(0.0) == []
    assert engine.next_at > 0.0
    assert engine.step(engine.next_at / 2) == []
    assert engine.generation_tokens_total == 0


def test_step_time_is_the_larger_of_prefill_and_decode() -> None:
    pace = Pace(a=1.0, b=0.1, c=2.0, d=0.5, e=0.01)
    assert pace.step_s(100, 0, 0) == pytest.approx(11.0)
    assert pace.step_s(0, 4, 100) == pytest.approx(5.0)
    assert pace.step_s(100, 4, 100) == pytest.approx(11.0)
    engine = Engine(speed=2.0, pace=pace)
    engine.submit(request("a", 100, 2), 0.0)
    times = [now for now, _ in run(engine)]
    assert times == pytest.approx([11.0 / 2, 11.0 / 2 + (2.0 + 0.5 + 0.01 * 100) / 2])


def test_default_pace_is_that_of_a_32b_model() -> None:
    pace = Pace()
    assert 15_000 < 8192 / pace.step_s(8192, 0, 0) < 20_000
    assert 0.015 <= pace.step_s(0, 1, 1000) < pace.step_s(0, 256, 256 * 2000) <= 0.026


def test_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    engine = Engine(speed=1.0, pace=Pace(a=1.0, b=0.0, c=1.0, d=0.0, e=0.0), step_tokens=100)
    engine.submit(request("short", 10, 5), 0.0)
    run(engine, until=1.0)  # its first token
    engine.submit(request("long", 250, 1), 1.0)
    made = [(now, event.id) for now, event in run(engine)]
    # the step begun at 1.0 did not know of it; then 99 tokens a step beside the decoding one: 99 + 99 + 52
    assert made == [(2.0, "short"), (3.0, "short"), (4.0, "short"), (5.0, "short"), (5.0, "long")]


def test_first_come_first_served_within_the_token_budget() -> None:
    engine = Engine(speed=1.0, pace=Pace(a=1.0, b=0.0, c=1.0, d=0.0, e=0.0), step_tokens=100)
    for id in "abc":
        engine.submit(request(id, 80, 1), 0.0)
    assert [(now, event.id) for now, event in run(engine)] == [(1.0, "a"), (2.0, "b"), (3.0, "c")]


def test_repeated_prompt_hits_the_prefix_cache() -> None:
    engine = Engine()
    engine.submit(request("a", 100, 4, text="same"), 0.0)
    run(engine)
    engine.submit(request("b", 100, 4, text="same"), 0.0)
    ((_, event),) = run(engine)
    assert event.cached_tokens == 96  # 6 full blocks of 16
    assert (engine.prefix_cache_queries, engine.prefix_cache_hits) == (200, 96)


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    engine = Engine()
    for id in "ab":
        engine.submit(request(id, 32, 4, text="same"), 0.0)
        ((_, event),) = run(engine)
    assert event.cached_tokens == 16


def test_the_answer_is_cached_for_the_next_turn() -> None:
    engine = Engine()
    engine.submit(request("a", 30, 34, text="talk"), 0.0)
    run(engine)
    engine.submit(request("b", 80, 4, text="talk"), 0.0)  # the same talk, gone on
    ((_, event),) = run(engine)
    assert event.cached_tokens == 48  # the last token made has no KV yet: 63 computed, 3 full blocks


def test_cache_speeds_up_the_first_token() -> None:
    engine = Engine(speed=1.0)
    times = []
    for id in "ab":
        began = engine.next_at if engine.next_at < math.inf else 0.0
        engine.submit(request(id, 8000, 1, text="same"), began)
        times.append(run(engine)[0][0] - began)
    assert times[0] > 10 * times[1]


def test_least_recently_used_prefix_is_evicted_first() -> None:
    engine = Engine(blocks=10)
    for id in "abc":  # 3 blocks each, one of them not full
        engine.submit(request(id, 40, 4), 0.0)
        run(engine)
    cached = {}
    for id in "cba":
        engine.submit(Request(id + "2", 40, 4, chain([f"{id}{n}" for n in range(44)])), 0.0)
        cached[id] = run(engine)[0][1].cached_tokens
    assert cached == {"c": 32, "b": 32, "a": 32}  # 6 blocks of prefixes and 3 in use: all fit
    engine.submit(request("big", 100, 1), 0.0)  # 7 blocks: evicts c, the oldest by now, then b's tail
    run(engine)
    engine.submit(Request("a3", 40, 4, chain([f"a{n}" for n in range(44)])), 0.0)
    assert run(engine)[0][1].cached_tokens == 32
    engine.submit(Request("c3", 40, 4, chain([f"c{n}" for n in range(44)])), 0.0)
    assert run(engine)[0][1].cached_tokens == 0


def test_running_blocks_are_shared_and_never_evicted() -> None:
    pool = BlockPool(4)
    assert pool.take(2)
    pool.fill("x")
    pool.fill("y")
    pool.reference("x")
    pool.release(["x", "y"], 0)
    assert pool.available == 3  # x is still held once
    assert pool.take(3)
    assert pool.match(["x", "y"]) == 1
    assert not pool.take(1)


def test_admission_waits_for_blocks_and_keeps_the_order() -> None:
    engine = Engine(speed=1.0, blocks=10)
    engine.submit(request("a", 100, 20), 0.0)  # 8 blocks in the end
    engine.submit(request("b", 60, 4), 0.0)  # 4 blocks: must wait
    engine.submit(request("c", 10, 4), 0.0)  # would fit, but came later
    engine.step(0.0)
    assert (engine.running, engine.waiting) == (1, 2)
    finished = [event.id for _, event in run(engine) if event.finished]
    assert finished[0] == "a"
    assert engine.kv_usage == 0.0


def test_sequences_are_limited() -> None:
    engine = Engine(speed=1.0, max_sequences=2)
    for id in "abc":
        engine.submit(request(id, 10, 3), 0.0)
    engine.step(0.0)
    assert (engine.running, engine.waiting) == (2, 1)
    assert len({event.id for _, event in run(engine) if event.finished}) == 3


def test_newest_is_preempted_when_memory_runs_out_and_nothing_is_lost() -> None:
    engine = Engine(speed=1.0, blocks=8)
    engine.submit(request("a", 48, 60), 0.0)
    engine.submit(request("b", 48, 60), 0.0)
    events = run(engine)
    assert engine.preemptions_total >= 1
    for id in "ab":
        assert [event.generated for _, event in events if event.id == id] == list(range(1, 61))
    order = [event.id for _, event in events if event.finished]
    assert order == ["a", "b"]
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)
    assert engine.prompt_tokens_total == 96  # recomputing is no new prompt


def test_request_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 9 KV blocks, the engine has 8"):
        Engine(blocks=8).submit(request("a", 128, 1), 0.0)


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "pause"])
def test_abort_frees_at_once(phase: str) -> None:
    engine = Engine(speed=1.0, blocks=20, max_sequences=1 if phase == "waiting" else 8, step_tokens=64)
    if phase == "waiting":
        engine.submit(request("first", 10, 100), 0.0)
    engine.submit(request("a", 150, 100, gap_s=5.0 if phase == "pause" else 0.0), 0.0)
    engine.step(0.0)
    if phase in ("decode", "pause"):
        while not engine.step(engine.next_at):
            pass
        assert engine.kv_usage > 0
    assert engine.abort("a")
    assert not engine.abort("a")
    assert (engine.waiting, engine.running) == (0, 1 if phase == "waiting" else 0)
    engine.abort("first")
    assert engine.kv_usage == 0.0
    assert [event for _, event in run(engine) if event.id == "a"] == []


def test_abort_lets_a_waiting_request_in() -> None:
    engine = Engine(max_sequences=1)
    engine.submit(request("stuck", 10, 5, hold_after=2), 0.0)
    engine.submit(request("next", 10, 5), 0.0)
    assert [event.id for _, event in run(engine)] == ["stuck"]
    assert (engine.running, engine.waiting, engine.next_at) == (1, 1, math.inf)
    engine.abort("stuck")
    assert [event.id for _, event in run(engine)] == ["next"]


def test_delay_and_gap_pace_an_instant_engine() -> None:
    engine = Engine()
    engine.submit(request("a", 10, 3, delay_s=1.0, gap_s=0.5), 2.0)
    assert [(now, event.generated) for now, event in run(engine)] == [(3.0, 1), (3.5, 2), (4.0, 3)]


def test_paced_and_unpaced_requests_do_not_disturb_each_other() -> None:
    engine = Engine()
    engine.submit(request("slow", 10, 3, gap_s=1.0), 0.0)
    run(engine, until=0.0)
    engine.submit(request("fast", 10, 50), 0.25)
    made = [(now, event.id, event.generated) for now, event in run(engine)]
    assert made == [(0.25, "fast", 50), (1.0, "slow", 2), (2.0, "slow", 3)]


def test_chain_depends_on_everything_before() -> None:
    one = chain(list("abcdefghijklmnop" * 2))
    other = chain(list("Xbcdefghijklmnop" + "abcdefghijklmnop"))
    assert len(one) == len(other) == 2
    assert one[0] != one[1]
    assert not set(one) & set(other)
    assert chain(list("abcdefghijklmnop" * 2), "other model")[0] != one[0]
    assert chain(list("abc")) == []


@pytest.mark.parametrize("seed", range(8))
def test_a_coarse_engine_tells_the_same_times(seed: int) -> None:
    """First tokens, ends, cache hits and preemptions, with queues, full memory and aborts on the way."""
    dice = random.Random(seed)
    arrivals = []
    at = 0.0
    for n in range(150):
        at += dice.expovariate(2.0)
        text = f"talk{dice.randrange(20)}"
        arrivals.append((at, request(str(n), dice.randrange(1, 900), dice.randrange(1, 300), text=text)))
    aborts = sorted((at + dice.uniform(0.1, 5.0), one.id) for at, one in dice.sample(arrivals, 10))

    def play(engine: Engine) -> dict[tuple[object, bool], tuple[float, int, int]]:
        told: dict[tuple[object, bool], tuple[float, int, int]] = {}
        happenings = sorted(
            [(at, 0, one) for at, one in arrivals] + [(at, 1, id) for at, id in aborts], key=lambda one: one[:2]
        )
        for at, kind, what in [*happenings, (math.inf, 2, None)]:
            while (now := engine.next_at) <= at and now < math.inf:
                for event in engine.step(now):
                    if event.generated == 1 or event.finished:
                        told[event.id, event.finished] = (now, event.generated, event.cached_tokens)
            if kind == 0:
                engine.submit(what, at)  # type: ignore[arg-type]
            elif kind == 1:
                engine.abort(what, at)
        return told

    options = {"speed": 1.0, "blocks": dice.choice([150, 2000]), "max_sequences": dice.choice([4, 64])}
    fine, coarse = Engine(**options), Engine(**options, coarse=True)  # type: ignore[arg-type]
    exact, quick = play(fine), play(coarse)
    assert exact.keys() == quick.keys()
    for key, (now, generated, cached) in exact.items():
        assert quick[key] == (pytest.approx(now, abs=1e-6), generated, cached)
    assert (fine.preemptions_total, fine.prefix_cache_hits) == (coarse.preemptions_total, coarse.prefix_cache_hits)
    assert fine.generation_tokens_total == coarse.generation_tokens_total
