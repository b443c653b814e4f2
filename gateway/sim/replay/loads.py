"""What is asked, and when: a trace in Mooncake's form, or a load made of dice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from gateway.routing.prefix import Prompt

#: one id of the trace stands for this many tokens
BLOCK_TOKENS: Final = 512
#: arrivals of the trace were written down in buckets of this length
BUCKET_S: Final = 3.0
_ENDS: Final = tuple(range(BLOCK_TOKENS, 2_000_000, BLOCK_TOKENS))


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds from the beginning
    prompt: Prompt  # its hashes are the engine's block ids, too
    output_tokens: int
    session: str = ""


class _Line(msgspec.Struct):
    """https://github.com/kvcache-ai/Mooncake: FAST25-release. `timestamp` in milliseconds."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class BadTrace(ValueError):
    """The trace cannot be read; the message names the line."""


def read_trace(path: Path, seed: int, count: int | None = None, bucket_s: float = BUCKET_S) -> list[Arrival]:
    """The trace's first `count` requests, each at a random place of its bucket. OSError, BadTrace."""
    dice = random.Random(seed)
    decoder = msgspec.json.Decoder(_Line)
    arrivals = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise BadTrace(f"{path}:{number}: {error}") from None
        tokens = max(1, line.input_length)
        ids = line.hash_ids[: tokens // BLOCK_TOKENS]  # the last block is not full, and no engine keeps it
        arrivals.append(
            Arrival(
                line.timestamp / 1000 + dice.random() * bucket_s,
                Prompt(ids, _ENDS, tokens),
                max(1, line.output_length),
                str(ids[1]) if len(ids) > 1 else "",  # all share the first block; the second begins a conversation
            )
        )
        if len(arrivals) == count:
            break
    if not arrivals:
        raise BadTrace(f"{path}: no requests")
    arrivals.sort(key=lambda one: one.at)
    return arrivals


def _blocks(dice: random.Random, tokens: int) -> list[int]:
    return [dice.getrandbits(62) for _ in range(tokens // BLOCK_TOKENS)]


def unique(dice: random.Random, count: int, rate: float) -> list[Arrival]:
    """Prompts that have nothing in common: no routing by prefix can help, and none must harm."""
    arrivals, at = [], 0.0
    for _ in range(count):
        at += dice.expovariate(rate)
        tokens = min(100_000, max(50, int(dice.lognormvariate(8.0, 1.0))))  # median 3,000, mean 4,900
        arrivals.append(
            Arrival(at, Prompt(_blocks(dice, tokens), _ENDS, tokens), max(1, int(dice.expovariate(1 / 250))))
        )
    return arrivals


def decode_bound(dice: random.Random, count: int, rate: float) -> list[Arrival]:
    """Short prompts and long answers: engines are full of streams, prompts weigh nothing."""
    arrivals, at = [], 0.0
    for _ in range(count):
        at += dice.expovariate(rate)
        tokens = dice.randrange(40, 400)
        arrivals.append(
            Arrival(at, Prompt(_blocks(dice, tokens), _ENDS, tokens), max(1, int(dice.expovariate(1 / 1200))))
        )
    return arrivals


def shared_prefix(dice: random.Random, count: int, rate: float) -> list[Arrival]:
    """One system prompt of 4,096 tokens for all, then 200 groups with 6,144 tokens in common, then a question."""
    system = _blocks(dice, 4096)
    groups = [_blocks(dice, 6144) for _ in range(200)]
    arrivals, at = [], 0.0
    for _ in range(count):
        at += dice.expovariate(rate)
        group = min(int(dice.paretovariate(0.8)) - 1, 199)
        tokens = 4096 + 6144 + dice.randrange(100, 3000)
        blocks = [*system, *groups[group], *_blocks(dice, tokens - 10_240)]
        arrivals.append(
            Arrival(at, Prompt(blocks, _ENDS, tokens), max(1, int(dice.expovariate(1 / 200))), f"group{group}")
        )
    return arrivals


def conversations(dice: random.Random, count: int, rate: float) -> list[Arrival]:
    """Talks of several turns: each prompt is the one before, the answer, and a new question."""
    arrivals: list[Arrival] = []
    at, talk = -600.0, 0  # by the time that counts, talks of every age are under way
    while at < 1.2 * count / rate + 60:
        at += dice.expovariate(rate / 5)
        talk += 1
        turn_at, blocks, tokens = at, _blocks(dice, 2048), 2048
        for _ in range(1 + int(dice.expovariate(1 / 4.5))):
            added = int(dice.lognormvariate(6.5, 1.0))
            output = max(1, int(dice.expovariate(1 / 300)))
            tokens += added
            blocks = [*blocks, *_blocks(dice, tokens - len(blocks) * BLOCK_TOKENS)]
            arrivals.append(Arrival(turn_at, Prompt(blocks, _ENDS, tokens), output, f"talk{talk}"))
            tokens += output
            turn_at += 5 + output / 40 + dice.expovariate(1 / 30)
    return sorted((one for one in arrivals if one.at >= 0), key=lambda one: one.at)[:count]


#: name -> how it is made, and requests a second for each engine of the default kind at seven to eight tenths of what it
#: can do if its cache is used as well as it can be
SYNTHETIC: Final[dict[str, tuple[Callable[[random.Random, int, float], list[Arrival]], float]]] = {
    "unique": (unique, 0.9),
    "decode": (decode_bound, 6.0),
    "shared": (shared_prefix, 2.4),
    "talks": (conversations, 0.9),
}


def synthetic(name: str, seed: int, count: int, engines: int, rate: float | None = None) -> list[Arrival]:
    """The load `name` of SYNTHETIC: `count` requests at `rate` a second, or as `engines` can take."""
    make, each = SYNTHETIC[name]
    return make(random.Random(seed), count, rate or each * engines)


def faster(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same requests, `factor` times as many a second."""
    return [Arrival(one.at / factor, one.prompt, one.output_tokens, one.session) for one in arrivals]
