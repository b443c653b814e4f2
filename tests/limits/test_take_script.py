"""take.lua on real servers, against the reference in bucket.py."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.limits import bucket
from gateway.limits.bucket import MICRO, Rules, State
from gateway.limits.redis import TAKE
from gateway.store.client import Store

LIFE_US = 10_000_000


def told(rules: Rules, kind: int = 0, held: int = 0, seq: int = 0, charge: int = 0, **more: int) -> list[int]:
    return [
        *(rules.burst, rules.rate, rules.debt, kind, held, seq, charge),
        *(more.get("ceiling", -1), more.get("want", 0), more.get("observe", 0), 60_000, more.get("keep", 0)),
        more.get("known", 0),
    ]


async def run(
    store: Store, buckets: dict[str, list[int]], *requests: list[tuple[int, int]], who: str = "a", call: int = 0
) -> Any:
    args: list[Any] = [who, LIFE_US, call]
    for one in buckets.values():
        args += one
    args.append(len(requests))
    for needs in requests:
        args.append(len(needs))
        for need in needs:
            args += need
    levels, loans, verdicts = await store.run(TAKE, list(buckets), args)
    return [int(level) for level in levels], [int(loan) for loan in loans], verdicts


async def stored(store: Store, key: str) -> State:
    found = {name.decode(): value for name, value in (await store.call("HGETALL", key)).items()}
    return State(int(found["l"]), int(found["f"]), int(found["t"]))


async def now_us(store: Store) -> int:
    seconds, micros = await store.call("TIME")
    return int(seconds) * MICRO + int(micros)


amounts = st.integers(0, 10**15)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    burst=st.integers(1, 10**9).map(lambda units: units * MICRO),
    rate=st.one_of(st.integers(0, 10**15), st.integers(0, 3 * MICRO)),
    level=st.integers(-(10**15), 10**15),
    frac=st.integers(0, MICRO - 1),
    ago=st.one_of(st.integers(-(10**6), 10**7), st.integers(0, 10**15)),
    out=st.integers(0, 10**9),
    charge=st.integers(-(10**15), 10**15).filter(bool),
    need=amounts,
)
async def test_the_script_counts_as_the_reference_does(
    store: Store, burst: int, rate: int, level: int, frac: int, ago: int, out: int, charge: int, need: int
) -> None:
    rules = Rules(burst, rate, burst)
    key = store.key("limit", "t")
    out = min(out, burst)
    level = min(level, burst)
    began_us = await now_us(store) - ago
    await store.call("DEL", key)
    await store.call(
        *("HSET", key, "l", level, "f", frac, "t", began_us, "b0", f"{out} {began_us + ago + 10**9} 0"),
    )
    (left,), _, ((refused, *_),) = await run(store, {key: told(rules, seq=1, charge=charge)}, [(1, need)])
    after = await stored(store, key)
    state = State(level, frac, began_us)
    bucket.refill(state, rules, after.at_us, out)
    bucket.charge(state, rules, charge, out)
    assert bool(refused) is not bucket.take(state, need)
    assert after == state
    assert left == state.level
    assert after.at_us >= began_us


async def test_numbers_keep_all_their_digits(store: Store) -> None:
    """Lua prints 1e+15 for what is not asked for with %.0f, and takes it back as less."""
    rules = Rules(10**15, 1, 10**15)
    key = store.key("limit", "t")
    levels, _, verdicts = await run(store, {key: told(rules)}, [(1, 123_456_789_012_345)])
    assert verdicts == [[0]]
    assert levels == [10**15 - 123_456_789_012_345]
    assert (await stored(store, key)).level == levels[0]


async def test_a_refused_request_changes_nothing_and_names_what_refuses(store: Store) -> None:
    rules = Rules(10 * MICRO, 1)
    one, two = store.key("limit", "one"), store.key("limit", "two")
    await run(store, {one: told(rules), two: told(rules)}, [(1, 2 * MICRO), (2, 9 * MICRO)])
    before = await store.call("HGETALL", one), await store.call("HGETALL", two)
    _, _, verdicts = await run(store, {one: told(rules), two: told(rules)}, [(1, MICRO), (2, 2 * MICRO)])
    assert verdicts == [[2]]
    assert (await store.call("HGETALL", one), await store.call("HGETALL", two)) == before


async def test_an_observed_bucket_refuses_nothing(store: Store) -> None:
    one, two = store.key("limit", "one"), store.key("limit", "two")
    buckets = {one: told(Rules(MICRO, 1), observe=1), two: told(Rules(5 * MICRO, 1))}
    levels, _, verdicts = await run(store, buckets, *(3 * [[(1, MICRO), (2, MICRO)]]))
    assert verdicts == [[0], [0, 1], [0, 1]]
    assert levels == [0, 2 * MICRO]


async def test_a_charge_is_taken_once_however_often_it_is_told(store: Store) -> None:
    rules = Rules(100, 0, 100)
    key = store.key("limit", "t")
    for _ in range(3):
        levels, _, _ = await run(store, {key: told(rules, seq=1, charge=30)})
        assert levels == [70]
    levels, _, _ = await run(store, {key: told(rules, seq=2, charge=-10)})
    assert levels == [80]


async def test_loans_are_a_part_of_the_burst(store: Store) -> None:
    """What one process holds on loan is refilled for nobody, until it is returned or its time is over."""
    rules = Rules(1000, 10**15)  # refilled at once
    key = store.key("limit", "t")
    levels, loans, _ = await run(store, {key: told(rules, want=600)}, [(1, 100)])
    assert (levels, loans) == ([675], [225])
    levels, loans, _ = await run(store, {key: told(rules)}, [(1, 1)], who="b")
    assert levels == [1000 - 225 - 1]
    levels, _, _ = await run(store, {key: told(rules, held=225)}, who="a")
    assert levels == [1000]


async def test_slots_of_a_process_that_is_heard_of_no_more_fall_out(store: Store) -> None:
    rules = Rules(2, 0)
    key = store.key("limit", "slots")
    _, _, verdicts = await run(store, {key: told(rules, kind=1)}, [(1, 1)], [(1, 1)], [(1, 1)])
    assert verdicts == [[0], [0], [1]]
    soon = await now_us(store) - 1
    await store.call("HSET", key, "a", f"2 {soon} 0")
    _, _, verdicts = await run(store, {key: told(rules, kind=1)}, [(1, 1)], who="b")
    assert verdicts == [[0]]


async def test_a_budget_is_passed_by_one_request_at_most(store: Store) -> None:
    rules = Rules(100, 0, 10**15)
    key = store.key("budget", "t")
    levels, _, verdicts = await run(store, {key: told(rules, kind=2)}, [(1, 99)], [(1, 50)], [(1, 1)])
    assert (levels, verdicts) == ([-49], [[0], [0], [1]])
    raised = Rules(200, 0, 10**15)
    levels, _, verdicts = await run(store, {key: told(raised, kind=2)}, [(1, 1)])
    assert (levels, verdicts) == ([50], [[0]])


async def test_the_script_survives_being_forgotten(store: Store) -> None:
    key = store.key("limit", "t")
    for left in (9, 8, 7):
        await store.call("SCRIPT", "FLUSH")
        levels, _, _ = await run(store, {key: told(Rules(10, 0))}, [(1, 1)])
        assert levels == [left]


async def test_what_an_unheard_call_took_of_a_budget_is_put_back(store: Store) -> None:
    """The calls 2 and 3 may have run or not, in any order: nobody heard of them."""
    rules = Rules(1000, 0, 10**15)
    for unheard in ((), (2,), (3,), (2, 3), (3, 2)):
        key = store.key("budget", f"t{unheard}")
        lending = told(rules, kind=2, want=100)
        levels, loans, _ = await run(store, {key: lending}, [(1, 50)], call=1)
        assert (levels, loans) == ([850], [100])
        for call in unheard:  # each returns what is on loan, takes 70, and borrows again
            again = told(rules, kind=2, held=100, want=100, known=1, seq=2, charge=5)
            await store.run(TAKE, [key], ["a", LIFE_US, call, *again, 1, 1, 1, 70])
        levels, loans, _ = await run(store, {key: told(rules, kind=2, held=100, known=1, seq=2, charge=5)}, call=4)
        assert (levels, loans) == ([945], [0]), unheard
        levels, _, _ = await run(store, {key: told(rules, kind=2, known=4)}, [(1, 45)], call=5)
        assert levels == [900]
        levels, _, _ = await run(store, {key: told(rules, kind=2, known=5)}, call=6)
        assert levels == [900]
