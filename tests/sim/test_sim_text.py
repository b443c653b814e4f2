from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sim.text import cut_at_stop, tokenize, vector, write


@given(st.text())
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(tokenize(text)) == text


def test_words_and_pieces() -> None:
    assert tokenize("Count 12345 internationalisations, été!") == [
        "Count", " 123", "45", " internationa", "lisations", ",", " é", "t", "é!",
    ]  # fmt: skip


def test_text_follows_from_the_seed_and_grows_at_the_end() -> None:
    short, long = write("a", 10), write("a", 200)
    assert long[:10] == short
    assert len(long) == 200
    assert write("b", 200) != long
    assert not short[0].startswith(" ")
    assert tokenize("".join(long)) == long  # counts agree when the answer comes back as a prompt


def test_opening_comes_first() -> None:
    assert "".join(write("a", 30, "This is simulated. ")).startswith("This is simulated. ")


@pytest.mark.parametrize(
    ("stops", "text", "tokens", "stop"),
    [
        (["France"], "The capital of ", 4, "France"),
        (["ital of F"], "The cap", 4, "ital of F"),
        (["nowhere"], "The capital of France is", 5, None),
        (["is", "The"], "", 1, "The"),
    ],
)
def test_stop_string_cuts_the_text(stops: list[str], text: str, tokens: int, stop: str | None) -> None:
    pieces, found = cut_at_stop(["The", " capital", " of", " France", " is"], stops)
    assert ("".join(pieces), len(pieces), found) == (text, tokens, stop)


def test_vectors_are_unit_and_deterministic() -> None:
    assert vector("hello", 8) == vector("hello", 8) != vector("world", 8)
    assert sum(x * x for x in vector("hello", 300)) == pytest.approx(1.0)
