"""Load: counted from the choice, dropped once; the work before a new prompt; the rate learned."""

from __future__ import annotations

import random

import pytest

from gateway.routing.load import Lease, Load, Rate
from gateway.routing.prefix import Index, Prompt


def prompt(first: int, tokens: int) -> Prompt:
    return Prompt(range(first, first + tokens // 100), range(100, 1_000_001, 100), tokens)


def test_a_lease_counts_at_once_and_is_dropped_once() -> None:
    load = Load()
    lease = Lease(load, 500, 10.0)
    assert (load.streams, load.served, load.prefill_tokens, load.chosen_at) == (1, 1, 500, 10.0)
    lease.began(10.5)
    lease.began(11.0)
    assert (load.streams, load.prefill_tokens) == (1, 0)
    lease.release()
    lease.release()
    assert (load.streams, load.served, load.prefill_tokens) == (0, 1, 0)


@pytest.mark.parametrize("began", [True, False])
def test_a_lease_is_dropped_however_its_block_is_left(began: bool) -> None:
    load = Load()
    lease = Lease(load, 500, 0.0)
    if began:
        lease.began(1.0)
    with pytest.raises(KeyboardInterrupt), lease:
        raise KeyboardInterrupt
    lease.began(2.0)  # a late word of the engine counts nothing
    lease.cached(1, 2)
    assert (load.streams, load.prefill_tokens, load.backlog(100.0, 3.0)[0]) == (0, 0, 0.0)


def test_leases_in_any_order_add_up() -> None:
    dice = random.Random(20)
    load = Load()
    held: list[Lease] = []
    for n in range(3000):
        act = dice.random()
        if held and act < 0.4:
            held.pop(dice.randrange(len(held))).release(float(n))
        elif held and act < 0.6:
            dice.choice(held).began(float(n))
        else:
            held.append(Lease(load, dice.randrange(1, 1000), float(n)))
        assert load.streams == len(held)
        assert load.prefill_tokens == sum(one.uncached for one in held if not one.began_at)
        assert 0 <= load.backlog(10.0, n + 0.5)[0] <= load.prefill_tokens


def test_what_waits_is_what_is_left() -> None:
    """Prompts are computed in the order they came: the first one's time is known, the others have not begun."""
    load = Load()
    first, second = Lease(load, 1000, 0.0), Lease(load, 600, 1.0)
    assert load.backlog(100.0, 4.0)[0] == 1000 - 400 + 600
    assert load.backlog(100.0, 60.0)[0] == 600  # late: it may end any moment, but the second has not begun
    first.began(12.0)
    assert load.backlog(100.0, 12.0)[0] == 600
    assert load.backlog(100.0, 15.0)[0] == 300
    second.began(16.0)
    assert load.backlog(100.0, 16.0)[0] == 0


def test_a_prompt_given_up_makes_room() -> None:
    load = Load()
    first, _ = Lease(load, 1000, 0.0), Lease(load, 600, 0.0)
    first.release(5.0)
    assert load.backlog(100.0, 5.0)[0] == 600
    assert load.backlog(100.0, 6.0)[0] == 500


def test_a_whole_answer_does_not_hold_the_queue() -> None:
    """Its first byte comes with its last: when its prompt's time has passed, the next prompt is under way."""
    load = Load()
    Lease(load, 1000, 0.0, streamed=False)
    Lease(load, 600, 0.0)
    assert load.backlog(100.0, 5.0) == (1100, 2)
    assert load.backlog(100.0, 13.0) == (300, 1)
    assert load.backlog(100.0, 17.0) == (0, 1)


def test_whole_answers_that_are_being_written_are_not_looked_at_again() -> None:
    load = Load()
    serve(load, 1000, 1000.0, 0.0)
    held = [Lease(load, 1000, 10.0, "m", streamed=False) for _ in range(5)]
    assert load.prefill_tokens == 5000
    last = Lease(load, 500, 13.5, "m")
    assert load.prefill_tokens == 2500  # three are computed, the fourth is under way
    assert load.backlog(1000.0, 13.5) == (2000, 3)
    for lease in [*held, last]:
        lease.release(20.0)
    assert (load.streams, load.prefill_tokens) == (0, 0)


# -- the rate -----------------------------------------------------------------------------------------------------


def serve(load: Load, tokens: int, rate: float, at: float, first: int = 0) -> None:
    lease = Lease(load, tokens, at, "m", prompt(first, tokens) if first else None)
    lease.began(at + tokens / rate)
    lease.release()


def test_the_rate_is_learned_from_the_first_prompt_on_and_by_model() -> None:
    load = Load()
    assert load.rate("m") is None
    serve(load, 4000, 2000.0, 0.0)
    assert load.rate("m") == pytest.approx(2000.0, rel=0.01)
    assert load.rate("other") is None


def test_outliers_do_not_move_it() -> None:
    dice = random.Random(5)
    load = Load()
    for n in range(200):
        factor = dice.choice([0.01, 50.0]) if n % 5 == 0 else dice.uniform(0.9, 1.1)
        serve(load, dice.randrange(500, 5000), 2000.0 * factor, 100.0 * n)
    assert load.rate("m") == pytest.approx(2000.0, rel=0.1)


def test_it_follows_an_engine_that_became_slower() -> None:
    load = Load()
    for n in range(100):
        serve(load, 2000, 4000.0 if n < 50 else 1000.0, 100.0 * n)
    assert load.rate("m") == pytest.approx(1000.0)


def test_short_prompts_weigh_little() -> None:
    rate = Rate()
    for _ in range(15):
        rate.learn(150, 1.0)  # mostly the network
    for _ in range(5):
        rate.learn(20_000, 10.0)
    rate.learn(10, 0.0)
    assert rate.value == pytest.approx(2000.0)


def test_who_waited_for_another_teaches_nothing() -> None:
    load = Load()
    first, second = Lease(load, 1000, 0.0, "m"), Lease(load, 1000, 0.0, "m")
    first.began(1.0)
    second.began(1.001)  # in the same step
    assert load.rate("m") == pytest.approx(1000.0)
    first.release()
    second.release()
    assert load.rate("m") == pytest.approx(1000.0)


def test_a_whole_answers_time_teaches_nothing() -> None:
    load = Load()
    lease = Lease(load, 1000, 0.0, "m", streamed=False)
    lease.began(60.0)
    lease.release()
    assert load.rate("m") is None


def test_a_warm_prompt_teaches_what_the_engine_says_it_computed() -> None:
    load = Load(Index())
    serve(load, 10_000, 1000.0, 0.0, first=1)
    for n in range(40):
        lease = Lease(load, 1000, 100.0 + n, "m", prompt(1, 10_000))
        assert lease.believed_cached == 10_000
        lease.began(100.0 + n + 5.0)  # it was cold after all: 10,000 tokens in 5 s
        if n % 2:
            lease.cached(1, 9_000)
        lease.release()
    assert load.rate("m") == pytest.approx(2000.0, rel=0.01)


def test_no_word_of_the_cache_is_no_sign_of_an_empty_one() -> None:
    load = Load(Index())
    for reports in (False, True):
        Lease(load, 100, 0.0, "m", prompt(50, 1000)).release()
        Lease(load, 100, 0.0, "m", prompt(1, 1000)).release()
        lease = Lease(load, 100, 1.0, "m", prompt(1, 1000))
        lease.cached(0, 1000)
        assert load.index.match(prompt(50, 1000)) == (0 if reports else 1000)
        lease.release()
        other = Lease(load, 100, 1.0, "m", prompt(70, 1000))
        other.cached(10, 1000)
        other.release()


# -- a model that must be loaded ----------------------------------------------------------------------------------


def test_the_time_of_loading_is_learned() -> None:
    load = Load()
    serve(load, 1000, 1000.0, 0.0)
    lease = Lease(load, 1000, 100.0, "m", loads=True)
    assert load.loading["m"].until == 110.0
    lease.began(105.0)
    assert load.loading["m"].seconds == pytest.approx(4.0)  # 5 s, of which one was the prompt's
    assert load.loading["m"].until == 105.0
    assert load.rate("m") == pytest.approx(1000.0)
