"""Who takes the next request."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from gateway.routing.load import Lease, Load
from gateway.routing.policies import DEFAULT, POLICIES, Ask, Choice, Policy
from gateway.routing.prefix import Index, Prompt


class Engine:
    """An upstream and a candidate in one."""

    def __init__(self, name: str, weight: int = 1, rate: float | None = None) -> None:
        self.name = name
        self.weight = weight
        self.load = Load(Index())
        self.unloaded = False
        self.upstream = self
        if rate is not None:
            self.load.learn("m", 1000, 1000 / rate)


def fleet(count: int, weights: Sequence[int] = (), rates: Sequence[float] = ()) -> list[Engine]:
    return [Engine(f"e{n}", weights[n] if weights else 1, rates[n] if rates else None) for n in range(count)]


def ask(first: int = 0, tokens: int = 1000, now: float = 0.0, session: str = "", then: int = 0) -> Ask:
    """A prompt of `tokens` that begins like all with the same `first`, the last `then` of them its own."""
    count = tokens // 100
    own = random.Random(f"{first}{then}{now}{session}").getrandbits(60)
    ids = [first * 100_000 + n for n in range(count - then // 100)] + [own + n for n in range(then // 100)]
    prompt = Prompt(ids, range(100, 1_000_001, 100), tokens)
    return Ask("m", tokens, prompt.itself, lambda: session, now)


def send(engines: Sequence[Engine], policy: Policy[Engine], one: Ask) -> tuple[Choice[Engine], Lease]:
    choice = policy(engines, one)
    return choice, Lease(choice.candidate.load, choice.uncached, one.now, "m", one.hashed)


def run_down(engines: Sequence[Engine], policy: Policy[Engine], asks: Sequence[Ask], rate: float) -> Counter[str]:
    """Serve `asks` on engines that compute one prompt after the other; an answer ends a second after it began."""
    free_at = dict.fromkeys((one.name for one in engines), 0.0)
    under_way: list[tuple[float, bool, int, Lease]] = []
    counts = Counter[str]()
    for n, one in enumerate(asks):
        for event in sorted(event for event in under_way if event[0] <= one.now):
            under_way.remove(event)
            at, begins, _, lease = event
            if begins:
                lease.began(at)
            else:
                lease.release(at)
        choice, lease = send(engines, policy, one)
        name = choice.candidate.name
        counts[name] += 1
        began = free_at[name] = max(free_at[name], one.now) + choice.uncached / rate
        under_way += [(began, True, n, lease), (began + 1.0, False, n, lease)]
    return counts


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"power_of_two", "session", "bounded_hash", "sglang"}))
@pytest.mark.parametrize("first", [0, 7])
def test_a_burst_on_idle_engines_spreads_evenly(name: str, first: int) -> None:
    """R1: 64 at once on 8 idle engines, of one prompt or each its own."""
    engines = fleet(8)
    for n in range(64):
        send(engines, POLICIES[name], ask(first or n + 10, then=1000 if not first else 0))
    assert all(7 <= one.load.streams <= 9 for one in engines)


@pytest.mark.parametrize("rate_of_arrival", [30.0, 60.0])
def test_a_shared_system_prompt_does_not_pull_all_to_one(rate_of_arrival: float) -> None:
    """R2, at 70 % and at 35 % of what eight engines can do: all prompts share 2,000 of their 3,000 tokens."""
    dice = random.Random(2)
    now, asks = 0.0, []
    for _ in range(2000):
        now += dice.expovariate(rate_of_arrival)
        asks.append(ask(1, 3000, now, then=1000))
    counts = run_down(fleet(8), POLICIES[DEFAULT], asks, rate=10_700.0)
    assert sum(counts.values()) == 2000
    assert max(counts.values()) / (2000 / 8) <= 1.25
    assert len(counts) == 8


def test_a_conversation_stays_where_it_is_warm() -> None:
    engines = fleet(4)
    where = []
    for turn in range(1, 6):
        choice, lease = send(engines, POLICIES[DEFAULT], ask(3, 4000 + 500 * turn, now=100.0 * turn))
        where.append(choice.candidate.name)
        assert choice.reason == ("cold" if turn == 1 else "warm")
        assert choice.cached + choice.uncached == 4000 + 500 * turn or turn > 1
        lease.began(100.0 * turn + 0.1)
        lease.release()
    assert len(set(where)) == 1


def test_it_leaves_a_warm_engine_that_is_saturated() -> None:
    engines = fleet(2, rates=[1000.0, 1000.0])
    choice, lease = send(engines, POLICIES[DEFAULT], ask(3, 2000))
    lease.began(2.0)
    lease.release()
    home = choice.candidate
    Lease(home.load, 800, 10.0)  # 0.8 s of work, and then nothing to compute: sooner than 2 s elsewhere
    assert POLICIES[DEFAULT](engines, ask(3, 2000, 10.0)).candidate is home
    Lease(home.load, 1500, 10.0)
    spilled = POLICIES[DEFAULT](engines, ask(3, 2000, 10.0))
    assert spilled.candidate is not home
    assert (spilled.reason, spilled.cached, spilled.uncached) == ("spill", 0, 2000)
    assert spilled.ttft_s == pytest.approx(2.0)


def test_a_full_fleet_goes_where_the_caches_are() -> None:
    """With nothing to spare, what must be computed is waited for by all: a longer wait at the warm engine is better."""
    engines = fleet(2, rates=[1000.0, 1000.0])
    choice, lease = send(engines, POLICIES[DEFAULT], ask(3, 2000))
    lease.began(2.0)
    lease.release()
    home, other = choice.candidate, next(one for one in engines if one is not choice.candidate)
    for _ in range(6):
        Lease(home.load, 1700, 10.0)
        Lease(other.load, 1300, 10.0)
    assert POLICIES["estimated_ttft"](engines, ask(3, 2000, 10.0)).candidate is other
    assert POLICIES[DEFAULT](engines, ask(3, 2000, 10.0)).candidate is home


def test_faster_engines_take_more_without_weights() -> None:
    dice = random.Random(3)
    rates = [2000.0, 2000.0, 8000.0]
    engines = fleet(3, rates=rates)
    work = Counter[str]()
    for n in range(300):
        one = ask(n + 1, dice.randrange(500, 3000), now=0.0)
        choice, _ = send(engines, POLICIES[DEFAULT], one)
        work[choice.candidate.name] += one.tokens
    assert work["e2"] / sum(work.values()) == pytest.approx(8 / 12, abs=0.12)


def test_an_engine_nobody_knows_is_tried() -> None:
    engines = [*fleet(2, rates=[5000.0, 5000.0]), Engine("new")]
    for n in range(2):
        send(engines, POLICIES[DEFAULT], ask(n + 1))
    assert POLICIES[DEFAULT](engines, ask(9)).candidate.name == "new"


def test_where_prompts_weigh_nothing_streams_decide() -> None:
    engines = fleet(3)
    for one, streams in zip(engines, (30, 10, 20), strict=True):
        for _ in range(streams):
            Lease(one.load, 50, 0.0).began(0.1)
    assert POLICIES[DEFAULT](engines, ask(1, 100, 1.0)).candidate.name == "e1"


# -- models that must be loaded -----------------------------------------------------------------------------------


def test_the_host_that_has_the_model_is_preferred_until_waiting_is_longer_than_loading() -> None:
    engines = fleet(2, rates=[1000.0, 1000.0])
    engines[0].unloaded = True
    for n in range(9):
        choice, _ = send(engines, POLICIES[DEFAULT], ask(n + 1))
        assert choice.candidate is engines[1]
        assert not choice.loads
    for n in range(9):  # ten seconds are the guess of what loading takes
        choice = POLICIES[DEFAULT](engines, ask(n + 50))
        if choice.candidate is engines[0]:
            break
        send(engines, POLICIES[DEFAULT], ask(n + 50))
    assert choice.loads
    assert choice.ttft_s is not None
    assert choice.ttft_s >= 10.0
    Lease(engines[0].load, choice.uncached, 0.0, "m", loads=True)
    again = POLICIES[DEFAULT](engines, ask(80, now=9.0))  # it is being loaded: in a second it is there
    assert not again.loads


def test_all_cold_hosts_are_as_good_as_each_other() -> None:
    engines = fleet(3)
    for one in engines:
        one.unloaded = True
    choice = POLICIES[DEFAULT](engines, ask(1))
    assert choice.loads


# -- the others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_only_looks(name: str) -> None:
    engines = fleet(4)
    Lease(engines[0].load, 10, 0.0, "m", ask(1).prompt)
    before = [(repr(one.load), one.load.served, dict(one.load.loading)) for one in engines]
    for n in range(20):
        assert POLICIES[name](engines, ask(n, session=str(n))).candidate in engines
    assert [(repr(one.load), one.load.served, dict(one.load.loading)) for one in engines] == before


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_take_the_only_one(name: str) -> None:
    (only,) = fleet(1)
    for session in ("", "s"):
        assert POLICIES[name]([only], ask(1, 0, session=session)).candidate is only


def test_in_turn() -> None:
    engines = fleet(3)
    names = [send(engines, POLICIES["round_robin"], ask(n, now=float(n)))[0].candidate.name for n in range(6)]
    assert names == ["e0", "e1", "e2"] * 2
    late = Engine("late")
    names = [
        send([*engines, late], POLICIES["round_robin"], ask(n, now=float(n)))[0].candidate.name for n in range(6, 14)
    ]
    assert Counter(names) == {"e0": 2, "e1": 2, "e2": 2, "late": 2}  # who came later catches nothing up


@pytest.mark.parametrize("name", ["weighted", "least_inflight", "sticky"])
def test_weights_share_the_load(name: str) -> None:
    engines = fleet(3, weights=[1, 2, 5])
    for n in range(80):
        send(engines, POLICIES[name], ask(n, tokens=1 if name == "sticky" else 1000))
    assert [one.load.streams for one in engines] == pytest.approx([10, 20, 50], abs=2)


def test_of_two_the_less_busy() -> None:
    engines = fleet(8)
    for n in range(800):
        send(engines, POLICIES["power_of_two"], ask(n))
    streams = [one.load.streams for one in engines]
    assert max(streams) - min(streams) < 20  # by single draws it would be about 60
    assert len(set(streams)) > 1


def test_sessions_stay_and_only_those_of_a_lost_engine_move() -> None:
    engines = fleet(5)
    before = {f"s{n}": POLICIES["session"](engines, ask(n, session=f"s{n}")).candidate.name for n in range(500)}
    assert all(60 < count < 140 for count in Counter(before.values()).values())
    after = {name: POLICIES["session"](engines[1:], ask(0, session=name)).candidate.name for name in before}
    assert all(after[name] == before[name] for name in before if before[name] != "e0")
    assert "e0" not in after.values()


def test_the_bounded_hash_keeps_its_bound() -> None:
    engines = fleet(4)
    reasons = Counter[str]()
    for _ in range(100):
        choice, _ = send(engines, POLICIES["bounded_hash"], ask(1))  # all of one prompt
        reasons[choice.reason] += 1
        mean = sum(one.load.streams for one in engines) / 4
        assert max(one.load.streams for one in engines) <= 1.25 * mean + 1
    assert reasons["hash"]
    assert reasons["spill"]


def test_the_rule_of_sglang() -> None:
    engines = fleet(2)
    choice, lease = send(engines, POLICIES["sglang"], ask(1, 1000))
    assert choice.reason == "cold"
    home = choice.candidate
    assert send(engines, POLICIES["sglang"], ask(1, 1900))[0].candidate is home
    for _ in range(40):
        Lease(home.load, 0, 0.0)
    choice = POLICIES["sglang"](engines, ask(1, 1000))
    assert (choice.candidate is home, choice.reason) == (False, "least")
    lease.release()


def test_one_after_the_other_they_spread_although_rates_differ_by_chance() -> None:
    engines = fleet(4, rates=[5000.0, 5020.0, 4990.0, 5010.0])
    counts = Counter[str]()
    for n in range(40):
        choice, lease = send(engines, POLICIES[DEFAULT], ask(n + 1, 3000, now=10.0 * n))
        counts[choice.candidate.name] += 1
        lease.began(10.0 * n + choice.uncached / 5000)
        lease.release()
    assert set(counts.values()) == {10}
    warm = POLICIES[DEFAULT](engines, ask(40, 3000, now=500.0))  # of those as good as each other only one is warm
    assert warm.reason == "warm"
