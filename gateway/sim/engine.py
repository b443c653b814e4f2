"""The engine model: continuous batching with chunked prefill and a paged, prefix-cached KV memory. Pure.

The clock is passed in, so the same model runs behind a socket in real time and in a discrete-event simulation:

    engine.submit(Request(...), now)
    while engine.next_at < math.inf:
        for event in engine.step(engine.next_at): ...

Each step spends a token budget over the running sequences in order of admission: a decoding sequence takes one token,
a prefilling one as much of its prompt as is left. The step lasts `max(a + b*prefill, c + d*batch + e*kv) / speed`
seconds. A sequence whose tokens are all computed by a step samples one token at the step's end. Memory is
`BLOCK_TOKENS`-token blocks: full blocks are shared by chained hash, reference-counted, and stay as prefix cache
(least recently used first out) after the last reference is gone. When a running sequence finds no block, the newest
running one is preempted and computed again later. The scheme is vLLM V1's (vllm/v1/core/sched/scheduler.py).

A `coarse` engine takes the decoding steps between two happenings together and tells first tokens and ends only: the
same times as step by step (but for rounding), at a hundredth of the work. It is what makes a simulation of hours cheap.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLOCK_TOKENS = 16


def chain(tokens: Sequence[Hashable], seed: Hashable = None) -> list[int]:
    """Chained hashes of the full blocks of `tokens`; equal only within one process (Python's `hash`)."""
    hashes: list[int] = []
    previous = hash(seed)
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        previous = hash((previous, tuple(tokens[start : start + BLOCK_TOKENS])))
        hashes.append(previous)
    return hashes


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a step takes: `max(a + b*prefill_tokens, c + d*batch + e*kv_tokens)`.

    Defaults: a 32B model on two H100: about 17,500 prompt tokens/s, decode steps of 15 to 25 ms.
    """

    a: float = 0.004
    b: float = 57e-6
    c: float = 0.015
    d: float = 20e-6
    e: float = 10e-9

    def step_s(self, prefill_tokens: int, batch: int, kv_tokens: int) -> float:
        prefill = self.a + self.b * prefill_tokens if prefill_tokens else 0.0
        decode = self.c + self.d * batch + self.e * kv_tokens if batch else 0.0
        return max(prefill, decode)


@dataclass(slots=True)
class Request:
    """What the engine must know of a request: counts and block hashes, never text.

    `blocks`: chained hashes of the full blocks of prompt + output (see `chain`); it may be shorter, then the rest is
    not cached. `delay_s` is added before the prefill, `gap_s` between tokens; after `hold_after` tokens the sequence
    makes no more and keeps its slot until it is aborted.
    """

    id: Hashable
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[Hashable] = ()
    delay_s: float = 0.0
    gap_s: float = 0.0
    hold_after: int | None = None


class Event(NamedTuple):
    """Tokens made: `generated` is the total so far. A finished sequence has left the engine."""

    id: Hashable
    generated: int
    finished: bool
    cached_tokens: int


class BlockPool:
    """KV memory. `free` counts blank blocks; unreferenced cached blocks can be evicted and count as available."""

    __slots__ = ("_idle", "_references", "free", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._references: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        return self.free + len(self._idle)

    def match(self, blocks: Sequence[Hashable]) -> int:
        """How many leading blocks are in memory."""
        for count, block in enumerate(blocks):
            if block not in self._references and block not in self._idle:
                return count
        return len(blocks)

    def spare(self, blocks: Sequence[Hashable]) -> int:
        """Blocks that would be available if `blocks`, all in memory, were referenced."""
        return self.available - sum(block in self._idle for block in blocks)

    def reference(self, block: Hashable) -> None:
        self._idle.pop(block, None)
        self._references[block] = self._references.get(block, 0) + 1

    def take(self, count: int) -> bool:
        """Take `count` blank blocks, evicting idle ones; False (and nothing taken) if there are not enough."""
        if count > self.available:
            return False
        while self.free < count:
            self._idle.popitem(last=False)
            self.free += 1
        self.free -= count
        return True

    def fill(self, block: Hashable) -> None:
        """A blank block of ours is now full and known by its hash; a duplicate of one in memory is given back."""
        if block in self._references or block in self._idle:
            self.free += 1
        self.reference(block)

    def release(self, blocks: Sequence[Hashable], blank: int) -> None:
        """Drop references, the deepest block first so that prefixes outlive their tails."""
        self.free += blank
        for block in reversed(blocks):
            count = self._references[block] - 1
            if count:
                self._references[block] = count
            else:
                del self._references[block]
                self._idle[block] = None


class _Sequence:
    __slots__ = ("blank", "cached", "computed", "generated", "held", "limit", "pause", "request", "running", "seen")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.limit = request.output_tokens
        if request.hold_after is not None:
            self.limit = min(self.limit, request.hold_after)
        self.computed = 0  # tokens whose KV is in memory
        self.generated = 0
        self.cached = 0  # prompt tokens found in the cache at the first admission
        self.held: list[Hashable] = []  # full blocks referenced
        self.blank = 0  # blocks not full yet
        self.running = False
        self.pause = 0  # number of the pause it is in; tells it from one it was preempted out of
        self.seen = False  # admitted once already: a preempted sequence counts no second cache query


class _Run:
    """`steps` decoding steps taken together from `began_at`, in which nothing else happens."""

    __slots__ = ("began_at", "first_s", "growth_s", "steps")

    def __init__(self, began_at: float, first_s: float, growth_s: float, steps: int) -> None:
        self.began_at = began_at
        self.first_s = first_s  # the first step's time
        self.growth_s = growth_s  # what each step takes longer than the one before: the KV memory grows
        self.steps = steps

    def end_of(self, steps: int) -> float:
        return self.began_at + steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def cut(self, now: float) -> None:
        """End with the step that is running at `now`."""
        spent = now - self.began_at
        base = self.first_s - self.growth_s / 2
        if self.growth_s > 0:
            exact = (math.sqrt(base * base + 2 * self.growth_s * spent) - base) / self.growth_s
        else:
            exact = spent / self.first_s
        steps = max(1, math.ceil(exact - 1e-9))
        self.steps = min(self.steps, steps)


class Engine:
    """One engine. `next_at` is when `step` is next due (inf: idle); `speed` 0 or None makes every step instant."""

    def __init__(
        self,
        *,
        speed: float | None = None,
        pace: Pace | None = None,
        blocks: int = 20_000,
        max_sequences: int = 256,
        step_tokens: int = 8192,
        block_tokens: int = BLOCK_TOKENS,
        coarse: bool = False,
    ) -> None:
        if coarse and not speed:
            raise ValueError("a coarse engine needs a speed")
        self.block_tokens = block_tokens
        self.coarse = coarse
        self._run: _Run | None = None
        self.speed = speed or 0.0
        self.pace = pace or Pace()
        self.max_sequences = max_sequences
        self.step_tokens = step_tokens
        self.pool = BlockPool(blocks)
        self.next_at = math.inf
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.prefix_cache_queries = 0  # tokens looked up
        self.prefix_cache_hits = 0  # tokens found
        self.preemptions_total = 0
        self._now = -math.inf
        self._sequences: dict[Hashable, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[Hashable, _Sequence] = {}  # in order of admission
        self._ready: dict[Hashable, _Sequence] = {}  # those running that are not pausing between tokens
        self._pausing: list[tuple[float, int, _Sequence]] = []  # heap
        self._pauses = 0
        self._planned: list[tuple[_Sequence, int]] = []

    def blank(self) -> Engine:
        """One like this, as it was when it was made."""
        return Engine(
            speed=self.speed,
            pace=self.pace,
            blocks=self.pool.total,
            max_sequences=self.max_sequences,
            step_tokens=self.step_tokens,
        )

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that running sequences hold, 0..1; idle cached blocks count as free."""
        return 1.0 - self.pool.available / self.pool.total

    def is_waiting(self, id: Hashable) -> bool:
        """Whether a request has been submitted and not been admitted yet."""
        sequence = self._sequences.get(id)
        return sequence is not None and not sequence.seen

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. ValueError if it could never fit into the KV memory."""
        needed = -(-(request.prompt_tokens + request.output_tokens) // self.block_tokens)
        if needed > self.pool.total:
            raise ValueError(f"request needs {needed} KV blocks, the engine has {self.pool.total}")
        sequence = _Sequence(request)
        self._sequences[request.id] = sequence
        if self._run is not None and not self._waiting:  # those that wait are let in when one ends, not before
            self._cut_run(now)
        self._waiting.append(sequence)
        if not self._planned:
            self.next_at = min(self.next_at, now)

    def abort(self, id: Hashable, now: float | None = None) -> bool:
        """Forget a request and free its memory at once, also in the middle of a step; False if it is unknown.

        A coarse engine must be told the time.
        """
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return False
        if self._run is not None:
            assert now is not None
            self._cut_run(now)
            self._split_run()
        if sequence.running:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
        if not self._planned and self._waiting:
            self.next_at = min(self.next_at, self._now)
        return True

    def step(self, now: float) -> list[Event]:
        """Complete the step that is due by `now` and begin the next; before `next_at` nothing happens."""
        if now < self.next_at:
            return []
        self._now = now
        events = self._complete(now)
        while self._pausing and self._pausing[0][0] <= now:
            _, pause, sequence = heapq.heappop(self._pausing)
            if sequence.pause == pause:
                sequence.pause = 0
                self._ready[sequence.request.id] = sequence
        self._admit(now)
        self._plan()
        if self._planned and not self.speed:
            events += self._complete(now)
            due = bool(self._ready) or (bool(self._waiting) and self._admissible(self._waiting[0]))
            self.next_at = now if due else self._next_pause()
        elif self._planned:
            prefill = sum(count for sequence, count in self._planned if count > 1)
            batch = sum(1 for sequence, count in self._planned if count == 1)
            kv_tokens = sum(sequence.computed for sequence, _ in self._planned)
            step_s = self.pace.step_s(prefill, batch, kv_tokens) / self.speed
            self.next_at = now + step_s
            if self.coarse and not prefill and not self._pausing:
                self._begin_run(now, step_s)
        else:
            self.next_at = self._next_pause()
        return events

    def _begin_run(self, now: float, step_s: float) -> None:
        """Take the decoding steps together up to the first end, as far as the memory reaches without preemption."""
        batch = len(self._planned)
        if batch < len(self._ready):
            return
        steps = self.pool.available // batch * self.block_tokens
        steps_blank = self.pool.free // batch * self.block_tokens
        for sequence, _ in self._planned:
            request = sequence.request
            if not sequence.generated or request.gap_s:
                return
            if sequence.computed + 1 < request.prompt_tokens + sequence.generated:  # preempted: computes again
                return
            steps = min(steps, sequence.limit - sequence.generated)
            if len(request.blocks) > len(sequence.held):  # what fills a block may give one back: evict step by step
                steps = min(steps, steps_blank)
        if steps > 1:
            self._run = _Run(now, step_s, self.pace.e * batch / self.speed, steps)
            self.next_at = self._run.end_of(steps)

    def _cut_run(self, now: float) -> None:
        assert self._run is not None
        self._run.cut(now)
        self.next_at = self._run.end_of(self._run.steps)

    def _split_run(self) -> None:
        """Complete all steps but the last one, which is running."""
        run, self._run = self._run, None
        assert run is not None
        for sequence, _ in self._planned:
            self._grow(sequence, sequence.computed + run.steps)
            self._advance(sequence, run.steps - 1)
            sequence.generated += run.steps - 1
            self.generation_tokens_total += run.steps - 1

    def _next_pause(self) -> float:
        return self._pausing[0][0] if self._pausing else math.inf

    def _pause(self, sequence: _Sequence, until: float) -> None:
        self._ready.pop(sequence.request.id, None)
        self._pauses += 1
        sequence.pause = self._pauses
        heapq.heappush(self._pausing, (until, self._pauses, sequence))

    def _leave(self, sequence: _Sequence) -> None:
        """Take a sequence off the running ones and free its blocks."""
        del self._running[sequence.request.id]
        self._ready.pop(sequence.request.id, None)
        self.pool.release(sequence.held, sequence.blank)
        sequence.held, sequence.blank, sequence.pause, sequence.running = [], 0, 0, False

    def _lookup(self, sequence: _Sequence) -> tuple[Sequence[Hashable], int]:
        """Cached leading blocks, and blank blocks needed beyond them; the last token is always computed."""
        tokens = sequence.request.prompt_tokens + sequence.generated
        blocks = sequence.request.blocks[: max(tokens - 1, 0) // self.block_tokens]
        cached = blocks[: self.pool.match(blocks)]
        return cached, -(-tokens // self.block_tokens) - len(cached)

    def _admissible(self, sequence: _Sequence) -> bool:
        cached, needed = self._lookup(sequence)
        return len(self._running) < self.max_sequences and needed <= self.pool.spare(cached)

    def _admit(self, now: float) -> None:
        """First come, first served: the head of the queue waits for its blocks, and all behind it wait too."""
        while self._waiting and len(self._running) < self.max_sequences:
            sequence = self._waiting[0]
            cached, needed = self._lookup(sequence)
            if needed > self.pool.spare(cached):
                return
            self._waiting.popleft()
            for block in cached:
                self.pool.reference(block)
            self.pool.take(needed)
            sequence.held, sequence.blank = list(cached), needed
            sequence.computed = len(cached) * self.block_tokens
            request = sequence.request
            sequence.running = True
            self._running[request.id] = sequence
            if sequence.limit > sequence.generated:
                self._ready[request.id] = sequence
            if not sequence.seen:
                sequence.seen = True
                sequence.cached = sequence.computed
                self.prefix_cache_queries += request.prompt_tokens
                self.prefix_cache_hits += sequence.cached
                self.prompt_tokens_total += request.prompt_tokens
                if request.delay_s > 0 and request.id in self._ready:
                    self._pause(sequence, now + request.delay_s)

    def _plan(self) -> None:
        budget = self.step_tokens
        for sequence in list(self._ready.values()):
            if not budget and self.speed:
                break
            if not sequence.running:  # preempted by one before it in this very step
                continue
            known = sequence.request.prompt_tokens + sequence.generated
            count = known - sequence.computed
            if not self.speed:
                if not sequence.request.gap_s:  # all that is left in one step; the last token has no KV
                    count += sequence.limit - sequence.generated - 1
            elif count > budget:
                count = budget
            if self._grow(sequence, sequence.computed + count):
                self._planned.append((sequence, count))
                budget -= count

    def _grow(self, sequence: _Sequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens, preempting the newest running sequences if it must; False if it went itself."""
        missing = -(-tokens // self.block_tokens) - len(sequence.held) - sequence.blank
        if missing <= 0:
            return True
        while not self.pool.take(missing):
            newest = next(reversed(self._running.values()))
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.blank += missing
        return True

    def _preempt(self, sequence: _Sequence) -> None:
        self._leave(sequence)
        self._planned = [entry for entry in self._planned if entry[0] is not sequence]
        sequence.computed = 0
        self._waiting.appendleft(sequence)
        self.preemptions_total += 1

    def _advance(self, sequence: _Sequence, count: int) -> None:
        """`count` more of its tokens are computed."""
        sequence.computed += count
        blocks, held = sequence.request.blocks, sequence.held
        if len(held) < len(blocks):
            for block in blocks[len(held) : sequence.computed // self.block_tokens]:
                self.pool.fill(block)
                held.append(block)
                sequence.blank -= 1

    def _complete(self, now: float) -> list[Event]:
        events: list[Event] = []
        planned, self._planned = self._planned, []
        run, self._run = self._run, None
        if run is not None:
            planned = [(sequence, run.steps) for sequence, _ in planned if sequence.running]
            for sequence, count in planned:
                self._grow(sequence, sequence.computed + count)
        for sequence, count in planned:
            if not sequence.running:  # aborted meanwhile
                continue
            request = sequence.request
            known = request.prompt_tokens + sequence.generated
            self._advance(sequence, count)
            made = sequence.computed - known + 1
            if made <= 0:
                continue
            sequence.generated += made
            self.generation_tokens_total += made
            finished = sequence.generated >= request.output_tokens
            if finished or not self.coarse or sequence.generated == made:
                events.append(Event(request.id, sequence.generated, finished, sequence.cached))
            if finished:
                self._leave(sequence)
                del self._sequences[request.id]
            elif sequence.generated >= sequence.limit:
                del self._ready[request.id]
            elif request.gap_s > 0:
                self._pause(sequence, now + request.gap_s)
        return events
