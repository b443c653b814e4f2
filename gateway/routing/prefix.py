"""What an engine probably has in its prefix cache: prompts as chained hashes, and the index of what was sent where.

A prompt is cut into blocks of bytes without a tokenizer, and each block's hash is seeded with the one before it: equal
hashes are equal prefixes. Blocks grow with their depth, so that a long prompt has few: at most 1/32 of what two prompts
share is lost at the end, and 400 KB are about 175 blocks.

The index remembers, for each engine, the hashes in order of last use and drops the oldest beyond the engine's capacity,
as the engine itself does. It is a belief: `Index.correct` mends it by what the engine reports.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final
from weakref import WeakSet

import xxhash

#: English text and JSON run at about four bytes a token. What is off in this is off for all engines alike, and in the
#: prefill rate learned from it.
BYTES_PER_TOKEN: Final = 4
_BLOCK_BYTES: Final = 256
_GROWTH: Final = 32  # a block is at most this part of what stands before it
_HASHED_BYTES: Final = 64 * 1024 * 1024  # what stands behind is not looked at

#: Of one entry, its share of the dictionary's table included; measured (tests/routing/test_prefix.py holds it).
ENTRY_BYTES: Final = 200
#: An engine's KV cache in tokens where nobody has said: rather too large, since half of the true size costs far more
#: than double (docs/decisions.md).
CAPACITY_TOKENS: Final = 1_000_000
_CAPACITY_MIN_TOKENS: Final = 16_384
_TOKEN_BITS: Final = 24
_TOKEN_MASK: Final = (1 << _TOKEN_BITS) - 1


def _block_ends() -> Iterator[int]:
    end = 0
    while end < _HASHED_BYTES:
        end += max(_BLOCK_BYTES, end // _GROWTH // _BLOCK_BYTES * _BLOCK_BYTES)
        yield end


#: where the blocks of any prompt end, in bytes and in tokens
_ENDS: Final = tuple(_block_ends())
_TOKEN_ENDS: Final = tuple(end // BYTES_PER_TOKEN for end in _ENDS)


class Prompt:
    """A prompt as the index knows it. `hashes[i]` stands for its first `ends[i]` tokens; `ends` may be longer."""

    __slots__ = ("ends", "hashes", "tokens")

    def __init__(self, hashes: Sequence[int], ends: Sequence[int], tokens: int) -> None:
        self.hashes = hashes
        self.ends = ends
        self.tokens = tokens

    def itself(self) -> Prompt:
        """For who has it already, where a function is wanted that makes one."""
        return self

    def __repr__(self) -> str:
        return f"<Prompt {self.tokens} tokens, {len(self.hashes)} blocks>"


def fingerprint(text: bytes | memoryview, seed: int = 0) -> Prompt:
    """The prompt of which `text` holds the bytes. Prompts with different seeds share nothing."""
    count = bisect_right(_ENDS, len(text))
    view = memoryview(text)
    digest = xxhash.xxh64_intdigest
    hashes = []
    start = 0
    for end in _ENDS[:count]:
        seed = digest(view[start:end], seed)
        hashes.append(seed)
        start = end
    return Prompt(hashes, _TOKEN_ENDS, max(1, len(text) // BYTES_PER_TOKEN))


def seed_of(*parts: str) -> int:
    """A seed that follows from `parts` (model, cache salt)."""
    return xxhash.xxh64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass"))


class Bound:
    """What all indexes together may hold. The largest one gives way."""

    __slots__ = ("_indexes", "entries", "entries_max")

    def __init__(self, max_bytes: int) -> None:
        self.entries_max = max(1, max_bytes // ENTRY_BYTES)
        self.entries = 0
        self._indexes: WeakSet[Index] = WeakSet()

    def join(self, index: Index) -> None:
        self._indexes.add(index)

    def shrink(self) -> None:
        """Drop the oldest of the largest until the bound is kept again."""
        self.entries = sum(map(len, self._indexes))  # an index that went with its engine has left no word
        while self.entries > self.entries_max:
            largest = max(self._indexes, key=len)
            largest.drop_entries(max(len(largest) // 16, self.entries - self.entries_max, 1))


class Belief:
    """What the index held of a prompt when it was sent: `cached` tokens, and how to tell what to forget if not."""

    __slots__ = ("cached", "marks", "prompt", "settled_at")

    def __init__(self, prompt: Prompt, cached: int, marks: list[int], settled_at: int) -> None:
        self.prompt = prompt
        self.cached = cached
        self.marks = marks  # of its blocks, the entries as they were
        self.settled_at = settled_at  # what was sent before this turn has been computed


class Index:
    """The prefixes one engine is believed to hold, least recently used first.

    A block is used later than all that follow it in its prompt, so a prefix is present whenever its continuation is,
    and `match` may search by halves.
    """

    __slots__ = ("__weakref__", "_bound", "_entries", "_turn", "capacity_tokens", "tokens")

    def __init__(self, bound: Bound | None = None, capacity_tokens: int = CAPACITY_TOKENS) -> None:
        self.capacity_tokens = capacity_tokens  # what is believed of the engine; `correct` moves it
        self.tokens = 0
        self._entries: dict[int, int] = {}  # hash -> turn of its last use << _TOKEN_BITS | tokens of its block
        self._turn = 0
        self._bound = bound
        if bound is not None:
            bound.join(self)

    def __len__(self) -> int:
        return len(self._entries)

    def resize(self, capacity_tokens: int) -> None:
        """The engine's cache has this many tokens."""
        self.capacity_tokens = capacity_tokens
        self._fit()

    def clear(self) -> None:
        """The engine has started anew."""
        if self._bound is not None:
            self._bound.entries -= len(self._entries)
        self._entries = {}
        self.tokens = 0

    def match(self, prompt: Prompt) -> int:
        """How many of the prompt's first tokens the engine is believed to hold."""
        hashes = prompt.hashes
        if not hashes or hashes[0] not in self._entries:
            return 0
        return prompt.ends[self._matched(hashes) - 1]

    def _matched(self, hashes: Sequence[int]) -> int:
        entries = self._entries
        high = len(hashes)
        if not high or hashes[0] not in entries:
            return 0
        if hashes[-1] in entries:
            return high
        low = 1
        while high - low > 1:
            middle = (low + high) >> 1
            if hashes[middle - 1] in entries:
                low = middle
            else:
                high = middle
        return low

    def use(self, prompt: Prompt, settled_at: int | None = None) -> Belief:
        """The prompt is being sent to the engine, which will then hold it.

        `settled_at`: the `turn` before which all that was sent has been computed; without it nothing is under way.
        """
        hashes, ends, entries = prompt.hashes, prompt.ends, self._entries
        matched = self._matched(hashes)
        marks = [entries[digest] for digest in hashes[:matched]]
        self._turn += 1
        turn = self._turn << _TOKEN_BITS
        before = len(entries)
        for at in range(len(hashes) - 1, -1, -1):  # deepest first: a prefix outlives its tail
            digest = hashes[at]
            tokens = ends[at] - (ends[at - 1] if at else 0)
            if entries.pop(digest, None) is None:
                self.tokens += tokens
            entries[digest] = turn | tokens
        bound = self._bound
        if bound is not None:
            bound.entries += len(entries) - before
        self._fit()
        belief = Belief(
            prompt, ends[matched - 1] if matched else 0, marks, self._turn if settled_at is None else settled_at
        )
        if bound is not None and bound.entries > bound.entries_max:
            bound.shrink()
        return belief

    @property
    def turn(self) -> int:
        """How many prompts were sent; the next one's turn is one more."""
        return self._turn

    def correct(self, belief: Belief, share: float) -> None:
        """The engine reports that it held `share` (0..1) of the prompt when it began on it.

        Now it holds the whole of it. But where less was held than believed, the engine has dropped what was last used
        when the first missing block was, and therefore all that is older: its cache is smaller than was thought, or
        new. Where more was held, and the index is full, the cache is larger.
        """
        prompt = belief.prompt
        held = share * prompt.tokens
        slack = max(_BLOCK_BYTES // BYTES_PER_TOKEN * 2, prompt.tokens // 16)  # engines cut elsewhere than we do
        if held + slack < belief.cached:
            missing = bisect_right(prompt.ends, held, 0, len(belief.marks))
            if missing >= len(belief.marks):
                return
            mark = belief.marks[missing]
            if mark >> _TOKEN_BITS < belief.settled_at:  # else it was under way itself, and no sign of anything
                self._drop_older(mark)
                self.capacity_tokens = max(_CAPACITY_MIN_TOKENS, min(self.capacity_tokens, self.tokens))
        elif held > belief.cached + slack and self.tokens > self.capacity_tokens * 7 // 8:
            self.capacity_tokens += self.capacity_tokens // 8  # what we dropped for want of room may be there

    def drop_entries(self, count: int) -> None:
        """Forget the `count` least recently used blocks."""
        entries = self._entries
        oldest = [entry for entry, _ in zip(entries.items(), range(count), strict=False)]
        self._drop(oldest)

    def _drop_older(self, mark: int) -> None:
        """Forget what was not used since `mark`."""
        oldest = []
        last = (mark >> _TOKEN_BITS) + 1 << _TOKEN_BITS
        for entry in self._entries.items():
            if entry[1] >= last:
                break
            oldest.append(entry)
        self._drop(oldest)

    def _fit(self) -> None:
        excess = self.tokens - self.capacity_tokens
        if excess <= 0:
            return
        oldest = []
        # A little more than must be: what a dictionary drops at its front it passes over again until it is rebuilt.
        excess += self.capacity_tokens >> 7
        for entry in self._entries.items():
            oldest.append(entry)
            excess -= entry[1] & _TOKEN_MASK
            if excess <= 0:
                break
        self._drop(oldest)

    def _drop(self, oldest: list[tuple[int, int]]) -> None:
        entries = self._entries
        for digest, value in oldest:
            del entries[digest]
            self.tokens -= value & _TOKEN_MASK
        if self._bound is not None:
            self._bound.entries -= len(oldest)

    def __repr__(self) -> str:
        return f"<Index {self.tokens} of {self.capacity_tokens} tokens in {len(self._entries)} blocks>"
