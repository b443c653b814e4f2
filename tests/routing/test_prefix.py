"""Prompts as chained hashes, and the index of what an engine is believed to hold."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import pytest

from gateway.routing.prefix import ENTRY_BYTES, Bound, Index, Prompt, fingerprint, seed_of


def text(length: int, seed: object = 0) -> bytes:
    return random.Random(str(seed)).randbytes(length // 2).hex().encode()


def prompt(*ids: int) -> Prompt:
    """Blocks of 100 tokens, by their hashes."""
    return Prompt(ids, range(100, 100 * len(ids) + 1, 100), 100 * len(ids))


def index(capacity: int = 1000, bound: Bound | None = None, sent: Sequence[Prompt] = ()) -> Index:
    one = Index(bound, capacity)
    for each in sent:
        one.use(each)
    return one


# -- fingerprints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 255, 256, 1000, 10_000, 100_000, 1_000_000])
def test_what_follows_changes_nothing_of_what_stands_before(length: int) -> None:
    one, longer = fingerprint(text(length)), fingerprint(text(length) + b"and more" * 1000)
    assert list(longer.hashes[: len(one.hashes)]) == list(one.hashes)
    covered = one.ends[len(one.hashes) - 1] * 4 if one.hashes else 0
    assert length - covered <= max(256, length / 32)  # what is lost at the end
    assert one.tokens == max(1, length // 4)


def test_one_byte_changes_all_that_follows_it() -> None:
    raw = bytearray(text(20_000))
    raw[5000] ^= 1
    before, after = fingerprint(text(20_000)), fingerprint(bytes(raw))
    same = [one == other for one, other in zip(before.hashes, after.hashes, strict=True)]
    assert same == [True] * 19 + [False] * (len(same) - 19)  # 19 blocks of 256 bytes are 4,864


def test_long_prompts_have_few_blocks() -> None:
    assert len(fingerprint(text(1024)).hashes) == 4
    assert len(fingerprint(text(400_000)).hashes) < 180
    assert len(fingerprint(bytes(70_000_000)).hashes) < 350


def test_models_and_salts_share_nothing() -> None:
    seeds = [seed_of("a", ""), seed_of("b", ""), seed_of("a", "salt"), seed_of("as", "alt"), seed_of("\ud800", "")]
    hashes = [fingerprint(text(5000), seed).hashes for seed in seeds]
    assert len({one for each in hashes for one in each}) == sum(map(len, hashes))


# -- the index ----------------------------------------------------------------------------------------------------


def test_the_longest_beginning_is_found() -> None:
    held = index(sent=[prompt(1, 2, 3), prompt(1, 2, 7, 8)])
    found = [held.match(one) for one in (prompt(1, 2, 3, 4), prompt(1, 2, 7, 9), prompt(1, 2), prompt(5), prompt())]
    assert found == [300, 300, 200, 0, 0]


def test_the_oldest_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    held = index(600, sent=[prompt(1, 2, 3), prompt(4, 5, 6)])
    held.use(prompt(1))  # used again: only its end is old now
    held.use(prompt(9))
    assert [held.match(one) for one in (prompt(1, 2, 3), prompt(4, 5, 6), prompt(9))] == [100, 300, 100]
    assert held.tokens <= 600


def test_matching_by_halves_is_matching_one_by_one() -> None:
    dice = random.Random(20)
    held = index(5000)
    talks = [[dice.getrandbits(60) for _ in range(dice.randrange(1, 40))] for _ in range(30)]
    for _ in range(3000):
        talk = dice.choice(talks)
        one = prompt(*talk[: dice.randrange(len(talk) + 1)])
        if dice.random() < 0.5:
            held.use(one)
        expected = next((n for n, each in enumerate(one.hashes) if not held.match(prompt(each))), len(one.hashes))
        assert held.match(one) == expected * 100
        assert held.tokens <= 5000
        assert held.tokens == 100 * len(held)


def test_a_smaller_cache_forgets_and_a_new_one_knows_nothing() -> None:
    held = index(sent=[prompt(*range(n, n + 5)) for n in (10, 20)])
    held.resize(500)
    assert held.tokens <= 500
    assert held.match(prompt(20)) == 100
    held.clear()
    assert (held.match(prompt(20)), held.tokens, len(held)) == (0, 0, 0)


# -- corrected by what engines report -----------------------------------------------------------------------------


def test_less_than_believed_forgets_what_is_older_and_shrinks_the_cache() -> None:
    first = [prompt(n, n + 1) for n in range(10, 50, 10)]
    held = index(100_000, sent=[prompt(*range(1000, 1300)), *first])
    belief = held.use(prompt(20, 21, 22))
    assert belief.cached == 200
    held.correct(belief, 0.0)
    assert held.match(prompt(10, 11)) == 0  # last used before 20, so it is gone, too
    assert held.match(prompt(1000)) == 0
    assert held.match(prompt(30, 31)) == 200
    assert held.match(prompt(20, 21, 22)) == 300  # it has been computed now
    assert held.capacity_tokens < 100_000


def test_a_part_that_was_held_is_kept() -> None:
    held = index(sent=[prompt(1), prompt(8), prompt(1, 2)])
    belief = held.use(prompt(1, 2, 3, 4))
    assert belief.cached == 200
    held.correct(belief, 0.5)
    assert held.match(prompt(8)) == 100


def test_a_prompt_under_way_is_no_sign() -> None:
    """The second of two at once finds nothing, because the first is not computed yet: nothing is forgotten."""
    held = index(sent=[prompt(7, 8, 9)])
    turn = held.turn + 1
    held.use(prompt(1, 2, 3))
    belief = held.use(prompt(1, 2, 3), turn)
    held.correct(belief, 0.0)
    assert held.match(prompt(7, 8, 9)) == 300
    assert held.capacity_tokens == 1000


def test_more_than_believed_widens_a_cache_that_is_full() -> None:
    """Else it was somebody else's prompt, or one of before we were started."""
    held = index(10_000)
    for n in range(20):
        held.correct(held.use(prompt(n, n + 100, n + 200)), 1.0)
    assert held.capacity_tokens == 10_000
    for n in range(20, 60):
        held.correct(held.use(prompt(n, n + 100, n + 200)), 1.0)
    assert held.capacity_tokens > 15_000


def test_an_engine_larger_than_thought_is_found_out() -> None:
    dice = random.Random(4)
    engine, belief = Index(None, 200_000), Index(None, 20_000)
    talks = [[dice.getrandbits(60) for _ in range(10)] for _ in range(100)]
    for _ in range(3000):
        one = prompt(*dice.choice(talks))
        held = engine.match(one)
        believed = belief.use(one)
        engine.use(one)
        belief.correct(believed, held / one.tokens)
    assert belief.capacity_tokens > 90_000


def test_an_engine_smaller_than_thought_is_found_out() -> None:
    """The belief is right more often after the feedback, though nobody said how large the cache is."""
    wrong = []
    for feedback in (False, True):
        dice = random.Random(4)
        engine, belief = Index(None, 20_000), Index(None, 200_000)
        talks = [[dice.getrandbits(60) for _ in range(10)] for _ in range(100)]
        missed = 0
        for n in range(3000):
            one = prompt(*dice.choice(talks))
            held = engine.match(one)
            believed = belief.use(one)
            if n > 1000:
                missed += abs(held - believed.cached)
            engine.use(one)
            if feedback:
                belief.correct(believed, held / one.tokens)
        wrong.append(missed)
    assert wrong[1] < wrong[0] / 2


# -- the bound ----------------------------------------------------------------------------------------------------


def test_a_day_of_unique_prompts_stays_within_the_bound() -> None:
    """R9. A day is a hundred times what fits: after twice as much nothing grows any more."""
    max_bytes = 4 * 1024 * 1024
    dice = random.Random(1)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        bound = Bound(max_bytes)
        fleet = [Index(bound, 50_000_000) for _ in range(8)]
        for n in range(6000):
            fleet[n % 8].use(fingerprint(dice.randbytes(4000), n))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bound.entries == sum(map(len, fleet)) <= max_bytes // ENTRY_BYTES
    assert peak - before <= max_bytes * 1.1
    assert min(map(len, fleet)) > max_bytes // ENTRY_BYTES / 8 * 0.8  # the engines share it


def test_an_engine_that_went_leaves_its_room() -> None:
    bound = Bound(ENTRY_BYTES * 100)
    gone = index(10_000_000, bound, [prompt(n) for n in range(90)])
    assert len(gone) == 90
    del gone
    stays = index(10_000_000, bound, [prompt(n) for n in range(100)])
    assert len(stays) >= 90
