"""Text without a model: a tokenizer that counts exactly, and readable answers that follow from the prompt alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b

#: A token: a word of up to 12 letters or 3 digits with its leading space, up to 4 other characters, or blanks.
#: Every character belongs to exactly one, so the tokens of a text join to the text.
_TOKEN = re.compile(r" ?[A-Za-z]{1,12}| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]{1,4}|\s{1,4}")

_SENTENCES = """\
The morning train was late again, so we walked along the river instead.
A small stone bridge crosses the water just below the mill.
Nobody remembers who planted the old pear tree behind the school.
The baker opens at six and the first loaves are gone by seven.
Rain is expected in the north, while the coast stays dry and mild.
She keeps a notebook in which every repair of the boat is written down.
Two lamps are enough to light the whole workshop in winter.
The map shows a path through the forest that few people still use.
They measured the room twice and ordered the wood on Friday.
A good rope is worth more than a fast boat, the old sailor said.
The library lends tools as well as books, which surprises most visitors.
On clear nights the hills across the bay can be seen from the tower.
The recipe asks for three eggs, a cup of flour and some patience.
Children from both villages learn to swim in the same cold lake.
The clock in the hall is four minutes fast and has been for years.
He painted the door green because there was some green paint left.
A letter takes two days to reach the island and three to come back.
The garden needs water in May and very little care after that.
Most of the stone in these walls came from the quarry on the hill.
The ferry carries bicycles for free when the wind is low.
An honest list of what is missing saves a second trip to town.
The bees were moved to the upper field before the clover opened.
We counted forty boats in the harbour on the day of the race.
The music stopped, and for a moment one could hear the sea.
Every tool has its place on the wall, marked with a thin white line.
The winter was mild, so the potatoes were in the ground by March.
A short walk after lunch does more good than a long sleep.
The teacher drew a circle on the board and asked what was inside it.
Fresh snow had covered the tracks by the time the others arrived.
The cheese is turned once a week and tasted once a month.
Their house stands where the road bends away from the river.
The answer was simple, but it took the whole evening to find it.""".splitlines()

_PIECES = [[" " + first, *rest] for first, *rest in (_TOKEN.findall(line) for line in _SENTENCES)]
_WHOLE = [" " + line for line in _SENTENCES]
#: every beginning of a sentence that is not all of it; two characters long or more, the first a blank
_BEGUN = frozenset(line[:end] for line in _WHOLE for end in range(2, len(line)))
_LONGEST = max(map(len, _BEGUN))


def tokenize(text: str) -> list[str]:
    """The tokens of `text`; `"".join(tokenize(text)) == text`."""
    return _TOKEN.findall(text)


def write(seed: str, count: int, opening: str = "") -> list[str]:
    """The first `count` tokens of the answer that `seed` leads to; `opening` comes before it.

    The first token has no leading space. A longer `count` continues the same text.
    """
    state = int.from_bytes(blake2b(seed.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
    return list(_write(state, count, opening))


@lru_cache(maxsize=256)
def _write(state: int, count: int, opening: str) -> tuple[str, ...]:
    pieces = tokenize(opening)
    while len(pieces) < count:
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        pieces += _PIECES[(state >> 33) % len(_PIECES)]
    del pieces[count:]
    if pieces:
        pieces[0] = pieces[0].lstrip(" ")
    return tuple(pieces)


def rest(seed: str, begun: str, count: int, opening: str = "") -> tuple[list[str], int] | None:
    """The next `count` tokens after `begun` in the answer that `seed` leads to, and how many tokens `begun` is; None
    if that answer begins otherwise. What is left of a token cut in two is one, and counts for `begun` as well.
    """
    pieces = write(seed, len(tokenize(begun)) + count + 1, opening)
    if not "".join(pieces).startswith(begun):
        return None
    position = 0
    for at, piece in enumerate(pieces):
        position += len(piece)
        if position > len(begun):
            left = piece[len(begun) - position :]
            done = at + (left != piece)
            return [left, *pieces[at + 1 :]][:count], done
    return [], len(pieces)


def beginnings(text: str, opening: str = "") -> Iterator[int]:
    """Where in `text` an answer of ours, cut anywhere, may begin that goes to the end of `text`; the earliest first."""
    end = len(text)
    found = []
    for length in range(min(_LONGEST, end), 1, -1):
        if text[end - length :] in _BEGUN:
            end -= length
            found.append(end)
            break
    while (line := next((line for line in _WHOLE if text.endswith(line, 0, end)), None)) is not None:
        end -= len(line)
        found.append(end)
    if opening:
        first = " " + opening.lstrip(" ")
        for length in range(len(first), 1, -1):
            if text.endswith(first[:length], 0, end):
                found.append(end - length)
                break
    return reversed(found)


def cut_at_stop(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    """Cut before the first of `stops`, as vLLM does: the text ends there, the tokens up to it count as generated.

    Returns the pieces, the last ones shortened (perhaps to ""), and the stop string found.
    """
    text = "".join(pieces)
    found = [(at, stop) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        return pieces, None
    at, stop = min(found)
    cut: list[str] = []
    position = 0
    for piece in pieces:
        if position >= at + len(stop):
            break
        cut.append(piece[: max(at - position, 0)])
        position += len(piece)
    return cut, stop


def vector(text: str, dimensions: int) -> list[float]:
    """A unit vector that follows from `text`: the same text gives the same vector."""
    material = b""
    counter = 0
    while len(material) < 2 * dimensions:
        material += blake2b(f"{counter}:{text}".encode(errors="surrogatepass")).digest()
        counter += 1
    raw = [int.from_bytes(material[2 * i : 2 * i + 2], "big") / 32767.5 - 1.0 for i in range(dimensions)]
    norm = sum(x * x for x in raw) ** 0.5 or 1.0
    return [x / norm for x in raw]
