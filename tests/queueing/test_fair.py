"""The fair queue: who is served, what a flood cannot do, and that nothing stays behind."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.queueing.contest import DEBTORS_MAX
from gateway.queueing.fair import FairQueue, Turn
from gateway.queueing.heap import Heap

HIGH, NORMAL, LOW = range(3)


def turn(tenant: str, *places: str, at: float = 0.0, **more: float) -> Turn:
    return Turn(tenant, places or ("gpu",), at, **{"cost": 1.0, **more})  # type: ignore[arg-type]  # fields by name


def served(queue: FairQueue, place: str = "gpu", count: int = 10_000) -> list[Turn]:
    out: list[Turn] = []
    while len(out) < count and (one := queue.next(place, float(len(out)))) is not None:
        out.append(one)
    return out


def assert_empty(queue: FairQueue) -> None:
    assert len(queue) == 0
    assert queue.tenants() == 0
    assert not queue._contests
    assert not any(queue._longest)
    assert not queue._deadlines._entries


def test_two_tenants_take_turns_whoever_came_first() -> None:
    queue = FairQueue()
    for _ in range(4):
        queue.enter(turn("flood"), 0)
    queue.enter(turn("light"), 0)
    queue.enter(turn("light"), 0)
    assert [one.tenant for one in served(queue)] == ["flood", "light", "flood", "light", "flood", "flood"]
    assert_empty(queue)


def test_within_a_tenant_the_first_to_come_is_the_first_served() -> None:
    queue = FairQueue()
    turns = [turn("one", cost=random.Random(1).random()) for _ in range(9)]
    for one in turns:
        queue.enter(one, 0)
    assert served(queue) == turns


def test_weights_share_in_proportion() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.enter(turn("small"), 0)
        queue.enter(turn("big", weight=3.0), 0)
    shares = Counter(one.tenant for one in served(queue, count=200))
    assert shares["big"] / shares["small"] == pytest.approx(3.0, rel=0.05)


def test_tokens_are_shared_and_not_requests() -> None:
    queue = FairQueue()
    for _ in range(400):
        queue.enter(turn("long", cost=10.0), 0)
        queue.enter(turn("short", cost=1.0), 0)
    shares = Counter(one.tenant for one in served(queue, count=220))
    assert shares["short"] / shares["long"] == pytest.approx(10.0, rel=0.1)


def test_output_counts_as_it_is_made() -> None:
    queue = FairQueue(output_weight=2.0)
    for _ in range(10):
        queue.enter(turn("talker"), 0)
        queue.enter(turn("other"), 0)
    first = queue.next("gpu", 0)
    assert first is not None
    assert first.tenant == "talker"
    queue.charge("gpu", NORMAL, "talker", 1.0, queue.cost(0, 2))  # four, and one for its prompt
    assert [one.tenant for one in served(queue, count=6)] == ["other"] * 5 + ["talker"]


def test_what_was_charged_too_much_is_given_back() -> None:
    queue = FairQueue()
    for _ in range(10):
        queue.enter(turn("one"), 0)
        queue.enter(turn("two"), 0)
    queue.charge("gpu", NORMAL, "one", 1.0, 50.0)
    queue.charge("gpu", NORMAL, "one", 1.0, -50.5)
    assert next(iter(served(queue, count=1))).tenant == "one"


def test_a_class_above_is_served_first_and_the_classes_do_not_share_a_bill() -> None:
    queue = FairQueue()
    for rank in (LOW, NORMAL, HIGH):
        for tenant in ("one", "two"):
            queue.enter(turn(tenant, rank=rank, cost=100.0 if tenant == "one" else 1.0), 0)
    assert [one.rank for one in served(queue)] == [HIGH, HIGH, NORMAL, NORMAL, LOW, LOW]


def test_nobody_saves_up_by_being_idle() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.enter(turn("busy"), 0)
    served(queue, count=500)
    for _ in range(100):
        queue.enter(turn("late"), 0)
    shares = Counter(one.tenant for one in served(queue, count=100))
    assert shares == {"busy": 50, "late": 50}


def test_nobody_escapes_its_debt_by_leaving_for_a_moment() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.enter(turn("patient"), 0)
    queue.enter(turn("hopper"), 0)
    assert next(iter(served(queue, count=1))).tenant == "patient"
    assert next(iter(served(queue, count=1))).tenant == "hopper"
    queue.charge("gpu", NORMAL, "hopper", 1.0, 40.0)
    queue.enter(turn("hopper"), 0)
    assert [one.tenant for one in served(queue, count=39)] == ["patient"] * 39


def test_what_was_used_while_nobody_waited_is_held_against_nobody() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.charge("gpu", NORMAL, "heavy", 1.0, 1000.0)
    assert_empty(queue)
    for _ in range(4):
        queue.enter(turn("heavy"), 0)
        queue.enter(turn("light"), 0)
    assert [one.tenant for one in served(queue, count=4)] == ["heavy", "light", "heavy", "light"]


def test_a_place_goes_only_to_those_who_want_it() -> None:
    queue = FairQueue()
    queue.enter(turn("one", "a"), 0)
    queue.enter(turn("two", "b"), 0)
    queue.enter(turn("three", "a", "b"), 0)
    assert queue.next("c", 0) is None
    assert [one.tenant for one in served(queue, "b")] == ["two", "three"]
    assert [one.tenant for one in served(queue, "a")] == ["one"]
    assert_empty(queue)


def test_use_of_one_pool_is_not_held_against_a_tenant_in_another() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.enter(turn("batch", "big"), 0)
        queue.enter(turn("other", "small"), 0)
        queue.enter(turn("batch", "small"), 0)
    served(queue, "big", 40)
    shares = Counter(one.tenant for one in served(queue, "small", 20))
    assert shares == {"batch": 10, "other": 10}


def test_two_contests_that_become_one_keep_their_order_and_their_debts() -> None:
    queue = FairQueue()
    for _ in range(20):
        queue.enter(turn("a-flood", "a"), 0)
        queue.enter(turn("b-flood", "b"), 0)
    served(queue, "a", 10)
    queue.charge("b", NORMAL, "b-flood", 1.0, 5.0)
    bridging = turn("bridge", "a", "b")
    queue.enter(bridging, 0)
    assert len(set(map(id, queue._contests.values()))) == 1
    assert served(queue, "b", 1)[0].tenant == "bridge"
    rest = Counter(one.tenant for place in "ab" for one in served(queue, place))
    assert rest == {"a-flood": 10, "b-flood": 20}
    assert_empty(queue)


def test_a_full_queue_sheds_the_lowest_class_first_and_its_newest() -> None:
    queue = FairQueue(most=3)
    low = [turn("one", rank=LOW) for _ in range(3)]
    for one in low:
        assert queue.enter(one, 0) is None
    high = turn("one", rank=HIGH)
    assert queue.enter(high, 0) is low[2]
    another = turn("one", rank=LOW)
    assert queue.enter(another, 0) is another
    assert served(queue) == [high, low[0], low[1]]


def test_a_flood_pushes_out_its_own_and_not_the_others() -> None:
    queue = FairQueue(most=100)
    shed = [queue.enter(turn("flood"), 0) for _ in range(300)]
    assert sum(one is not None for one in shed) == 200
    light = [turn("light") for _ in range(10)]
    assert {one.tenant for one in (queue.enter(one, 0) for one in light) if one is not None} == {"flood"}
    assert set(light) <= set(served(queue))


def test_deadlines() -> None:
    queue = FairQueue()
    turns = [turn("one", deadline_at=at) for at in (3.0, 1.0, 2.0)]
    for one in turns:
        queue.enter(one, 0)
    assert queue.expired(0.5) == []
    assert queue.expired(2.0) == [turns[1], turns[2]]
    assert not queue.leave(turns[1])
    assert served(queue) == [turns[0]]
    assert_empty(queue)


def test_the_wait_that_is_told_is_that_of_the_tenant_and_not_of_the_flood() -> None:
    queue = FairQueue()
    for _ in range(101):
        queue.enter(turn("flood"), 0)
    for second in range(1, 2):
        queue.next("gpu", float(second))
    assert queue.wait_s("flood", ["gpu"], NORMAL, 1.0, 1.0) == pytest.approx(101.0)
    assert queue.wait_s("light", ["gpu"], NORMAL, 1.0, 1.0) == pytest.approx(2.0)
    assert queue.wait_s("light", ["gpu"], LOW, 1.0, 1.0) == pytest.approx(101.0)
    assert queue.wait_s("light", ["gpu"], NORMAL, 1.0, 31.0) == pytest.approx(60.0), "it has come to a halt"
    assert queue.wait_s("light", ["elsewhere"], NORMAL, 1.0, 1.0) == 0.0


def test_upcoming_is_the_order_of_service() -> None:
    dice = random.Random(4)
    queue = FairQueue()
    for _ in range(200):
        queue.enter(turn(dice.choice("abc"), rank=dice.randrange(3), cost=dice.randrange(1, 9)), 0)
    expected = list(queue.upcoming())
    assert served(queue) == expected


def test_a_crowd_of_passing_tenants_takes_no_memory_for_ever() -> None:
    queue = FairQueue()
    for number in range(10_000):
        queue.enter(turn(f"guest-{number}"), 0)
        queue.enter(turn("host"), 0)
        queue.next("gpu", 0)
        queue.next("gpu", 0)
        queue.enter(turn("host"), 0)
    grade = queue._contests["gpu"].grades[NORMAL]
    assert len(grade.accounts) <= DEBTORS_MAX + grade.waiting
    assert len(grade.debtors._entries) <= 2 * DEBTORS_MAX + 100
    served(queue)
    assert_empty(queue)


def test_who_comes_back_has_the_credit_of_its_share_and_no_more() -> None:
    """3 s at a turn each second, beside one other: what two tenants share is 3 turns, so one or two come first."""
    queue = FairQueue(credit_s=3.0)
    for _ in range(200):
        queue.enter(turn("flood"), 0)
    for second in range(100):
        queue.next("gpu", float(second))
    for _ in range(20):
        queue.enter(turn("light"), 100.0)
    order = [queue.next("gpu", 100.0 + second) for second in range(20)]
    names = "".join(one.tenant[0] for one in order if one is not None)
    assert names.startswith("ll")
    assert 10 <= names.count("l") <= 12


def test_credit_is_given_once_and_does_not_run_down() -> None:
    """Newcomers beside one that has credit begin where it began, and not lower each time."""
    queue = FairQueue(credit_s=5.0)
    for _ in range(300):
        queue.enter(turn("flood"), 0)
    for second in range(100):
        queue.next("gpu", float(second))
    for number in range(50):
        queue.enter(turn(f"guest-{number}"), 100.0)
    grade = queue._contests["gpu"].grades[NORMAL]
    assert min(account.counter for account in grade.accounts.values()) >= grade.floor - grade.credit - 1e-9


def test_the_last_places_are_kept_for_those_within_their_share() -> None:
    free = 3
    queue = FairQueue(credit_s=3.0, spare=lambda places: free - 1)
    for _ in range(100):
        queue.enter(turn("flood"), 0)
    for second in range(20):
        assert queue.next("gpu", float(second)) is not None, "alone it may have all"
    queue.enter(turn("light"), 20.0)
    free = 1
    one = queue.next("gpu", 20.0)
    assert one is not None
    assert one.tenant == "light"
    assert queue.next("gpu", 20.0) is None
    free = 2
    one = queue.next("gpu", 20.0)
    assert one is not None
    assert one.tenant == "flood"


def test_places_are_kept_only_while_there_is_somebody_to_keep_them_for() -> None:
    queue = FairQueue(credit_s=3.0, spare=lambda places: 0)
    for _ in range(100):
        queue.enter(turn("flood"), 0)
    for second in range(20):
        queue.next("gpu", float(second))
    queue.enter(turn("light"), 20.0)
    assert queue.next("gpu", 20.0) is not None
    assert queue.next("gpu", 20.0) is None
    assert queue.next("gpu", 45.0) is None
    assert queue.next("gpu", 51.0) is not None


# -- properties -------------------------------------------------------------------------------------------------

moves = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "enter", "next", "next", "leave", "charge", "expire"]),
        st.sampled_from("abcd"),
        st.sets(st.sampled_from("xyz"), min_size=1),
        st.integers(0, 2),
        st.integers(0, 50),
    ),
    max_size=120,
)


@given(moves, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_whatever_happens_nobody_is_lost_and_nothing_is_left(what: list, most: int) -> None:  # type: ignore[type-arg]
    """Work conservation too: a place is refused only if nobody who waits would take it."""
    queue = FairQueue(most=most)
    waiting: dict[Turn, None] = {}
    for now, (move, tenant, places, rank, number) in enumerate(what):
        if move == "enter":
            one = turn(tenant, *places, rank=rank, cost=number, weight=1.0 + rank, deadline_at=now + number)
            waiting[one] = None
            shed = queue.enter(one, now)
            if shed is not None:
                lowest = max(other.rank for other in waiting)
                assert shed.rank == lowest
                del waiting[shed]
        elif move == "next":
            place = min(places)
            got = queue.next(place, now)
            able = [other for other in waiting if place in other.places]
            assert (got is None) == (not able)
            if got is not None:
                assert got.rank == min(other.rank for other in able)
                first = next(o for o in able if (o.tenant, o.rank, o.places) == (got.tenant, got.rank, got.places))
                assert got is first
                del waiting[got]
        elif move == "leave" and waiting:
            one = list(waiting)[number % len(waiting)]
            assert queue.leave(one)
            del waiting[one]
        elif move == "charge":
            queue.charge(min(places), rank, tenant, 1.0, number - 10)
        else:
            gone = queue.expired(now)
            assert set(gone) == {other for other in waiting if other.deadline_at <= now}
            for one in gone:
                del waiting[one]
        assert len(queue) == len(waiting) <= most
        assert set(queue.upcoming()) == set(waiting)
        assert [queue.depth(rank) for rank in range(3)] == [sum(o.rank == r for o in waiting) for r in range(3)]
    for one in waiting:
        assert queue.leave(one)
    assert_empty(queue)


@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([1.0, 2.0, 5.0]))
@settings(max_examples=60, deadline=None)
def test_the_gap_between_two_that_both_wait_is_bounded(seed: int, slots: int, weight: float) -> None:
    """Whatever the lengths: what two backlogged tenants got, for their weights, differs by no more than one prompt and
    what one may have running (OSDI 2024, theorem 4.8: twice the larger of both).
    """
    dice = random.Random(seed)
    queue = FairQueue(most=10_000)
    weights = {"one": 1.0, "two": weight}
    most_input, most_output = 100.0, 60.0
    for _ in range(400):
        for tenant in weights:
            queue.enter(turn(tenant, cost=float(dice.randrange(1, 101)), weight=weights[tenant]), 0)
    used = dict.fromkeys(weights, 0.0)
    running: deque[Turn] = deque()
    for step in range(300):
        while len(running) < slots:
            one = queue.next("gpu", step)
            assert one is not None
            used[one.tenant] += one.cost / weights[one.tenant]
            running.append(one)
        dice.shuffle(running)
        done = running.popleft()
        output = float(dice.randrange(0, int(most_output) + 1))
        queue.charge("gpu", NORMAL, done.tenant, weights[done.tenant], output)
        used[done.tenant] += output / weights[done.tenant]
        assert abs(used["one"] - used["two"]) <= 2 * max(most_input, slots * most_output)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_nobody_starves_inside_a_class(seed: int) -> None:
    """With many floods beside it, a tenant that asks one thing at a time is served within a round of all tenants."""
    dice = random.Random(seed)
    queue = FairQueue(most=100_000)
    floods = [f"flood-{number}" for number in range(5)]
    for _ in range(300):
        for flood in floods:
            queue.enter(turn(flood, cost=dice.randrange(1, 10)), 0)
    for _ in range(20):
        served(queue, count=dice.randrange(1, 40))
        mine = turn("mine", cost=5)
        queue.enter(mine, 0)
        for _ in range(10 * (len(floods) + 1)):
            if queue.next("gpu", 0) is mine:
                break
        else:
            pytest.fail("not served")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 9)), max_size=200))
def test_the_heap_gives_the_least_of_what_it_holds(what: list[tuple[int, int]]) -> None:
    heap: Heap[int] = Heap()
    held: dict[int, int] = {}
    for item, key in what:
        if key < 0:
            heap.drop(item)
            held.pop(item, None)
        else:
            heap.set(item, (key, 0))
            held[item] = key
        first = heap.first()
        assert (first is None) == (not held)
        if first is not None:
            assert held[first] == min(held.values())
        assert len(heap) == len(held)
        assert len(heap._entries) <= 2 * len(held) + 16 + 1
