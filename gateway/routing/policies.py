"""Which upstream takes the next request: one table, each policy a pure function of the candidates' loads.

    choice = POLICIES["sticky"](candidates, ask)

A policy looks and changes nothing; the load is counted by the lease that follows, before anything is awaited. Ties are
broken by how often an upstream was chosen for its weight, so that a burst on idle engines spreads. Eligibility (health,
drain, room below `max_in_flight`) is decided before: candidates are those that may be chosen, and never none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, log, sqrt
from typing import Any, Final, Generic, Protocol, TypeVar

from gateway.routing.load import PRIOR_LOADING_S, PRIOR_RATE, Load
from gateway.routing.prefix import Prompt, seed_of


class Engine(Protocol):
    """What a policy reads of an upstream."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> int: ...
    @property
    def load(self) -> Load: ...


class Candidate(Protocol):
    """An engine, and the name its model has there. `unloaded`: the engine must load the model before it answers."""

    @property
    def upstream(self) -> Any: ...  # an Engine; Any, since a protocol's member would have to match exactly
    @property
    def unloaded(self) -> bool: ...


T = TypeVar("T", bound=Candidate)


class Ask:
    """What is asked: about `tokens` of prompt. `fingerprint` hashes it when a policy first looks, if one does.

    `session` is the client's own word for what belongs together, "" without one; it, too, is looked for when asked.
    """

    __slots__ = ("_fingerprint", "_prompt", "_session", "model", "now", "tokens")

    def __init__(
        self, model: str, tokens: int, fingerprint: Callable[[], Prompt], session: Callable[[], str], now: float
    ) -> None:
        self.model = model
        self.tokens = tokens
        self._session = session
        self.now = now
        self._fingerprint = fingerprint
        self._prompt: Prompt | None = None

    @property
    def prompt(self) -> Prompt:
        if self._prompt is None:
            self._prompt = self._fingerprint()
        return self._prompt

    @property
    def session(self) -> str:
        return self._session()

    @property
    def hashed(self) -> Prompt | None:
        """The prompt if a policy has looked at it, else None."""
        return self._prompt


class Choice(Generic[T]):
    """`cached`, `uncached`: prompt tokens believed to be held by the engine, and to be computed. `ttft_s` is the
    predicted time to the first token, None from policies that predict none. `reason` is one word. `loads`: the engine
    must load the model first.
    """

    __slots__ = ("cached", "candidate", "loads", "reason", "ttft_s", "uncached")

    def __init__(
        self,
        candidate: T,
        reason: str,
        cached: int,
        uncached: int,
        ttft_s: float | None = None,
        loads: bool = False,
    ) -> None:
        self.loads = loads
        self.candidate = candidate
        self.reason = reason
        self.cached = cached
        self.uncached = uncached
        self.ttft_s = ttft_s

    def __repr__(self) -> str:
        return f"<Choice {self.candidate.upstream.name} {self.reason}>"


Policy = Callable[[Sequence[T], Ask], Choice[T]]


# -- by counting ------------------------------------------------------------------------------------------------


def round_robin(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The one that was not chosen for longest."""
    chosen = min(candidates, key=lambda one: (one.upstream.load.chosen_at, one.upstream.load.served))
    return Choice(chosen, "turn", 0, ask.tokens)


def weighted(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """In turn, each as often as its weight says."""
    chosen = min(candidates, key=lambda one: (one.upstream.load.served + 1) / one.upstream.weight)
    return Choice(chosen, "turn", 0, ask.tokens)


def least_inflight(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The fewest requests in flight for its weight."""
    return Choice(min(candidates, key=_streams), "least", 0, ask.tokens)


def power_of_two(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The less busy of two drawn ones (Mitzenmacher 1996). The draw follows from how many were served: no dice here."""
    count = len(candidates)
    draw = seed_of(str(sum(one.upstream.load.served for one in candidates)))
    first = draw % count
    second = (first + 1 + draw // count % max(1, count - 1)) % count
    return Choice(min((candidates[first], candidates[second]), key=_streams), "least", 0, ask.tokens)


# -- by hashing -------------------------------------------------------------------------------------------------


def session(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """Always the same one for a session, by rendezvous hashing: if one goes, only its sessions move."""
    key = ask.session
    if not key:
        return least_inflight(candidates, ask)
    chosen = max(candidates, key=lambda one: _rendezvous(one, key))
    return Choice(chosen, "session", 0, ask.tokens)


#: bounded-load hashing goes by the session, or by this much of the prompt's beginning
_HASHED_TOKENS: Final = 1024
_BOUND: Final = 1.25


def bounded_hash(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The first by hash that has less than 1.25 times the mean load (Mirrokni et al. 2016, by rendezvous hashing)."""
    key = ask.session
    if not key:
        prompt = ask.prompt
        blocks = sum(1 for _, end in zip(prompt.hashes, prompt.ends, strict=False) if end <= _HASHED_TOKENS)
        if not blocks:
            return least_inflight(candidates, ask)
        key = str(prompt.hashes[blocks - 1])
    weights = sum(one.upstream.weight for one in candidates)
    mean = (sum(one.upstream.load.streams for one in candidates) + 1) / weights
    ranked = sorted(candidates, key=lambda one: _rendezvous(one, key), reverse=True)
    for place, one in enumerate(ranked):
        if one.upstream.load.streams < ceil(_BOUND * mean * one.upstream.weight):
            return Choice(one, "spill" if place else "hash", 0, ask.tokens)
    return least_inflight(candidates, ask)


# -- by what is cached ------------------------------------------------------------------------------------------


def sglang(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The rule of SGLang's router: the shortest queue where queues differ by more than 32 and by 1.1 times; else the
    longest match where half of the prompt matches, else the shortest queue again.
    """
    prompt = ask.prompt
    streams = [one.upstream.load.streams for one in candidates]
    matches = [one.upstream.load.index.match(prompt) for one in candidates]
    low, high = min(streams), max(streams)
    best = max(matches)
    if high - low > 32 and high > 1.1 * low:
        at = streams.index(low)
        return Choice(candidates[at], "least", matches[at], prompt.tokens - matches[at])
    if best > 0.5 * prompt.tokens:
        at = matches.index(best)
        return Choice(candidates[at], "warm", best, prompt.tokens - best)
    at = min(range(len(candidates)), key=lambda at: _streams(candidates[at]))
    return Choice(candidates[at], "cold", matches[at], prompt.tokens - matches[at])


def lmetric(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The least product of prompt tokens to be computed and requests in flight (LMetric)."""
    prompt = ask.prompt

    def product(one: T) -> tuple[float, tuple[float, float]]:
        load = one.upstream.load
        uncached = prompt.tokens - load.index.match(prompt)
        return (load.prefill_tokens + uncached) * (load.streams + 1), _streams(one)

    chosen = min(candidates, key=product)
    cached = chosen.upstream.load.index.match(prompt)
    return Choice(chosen, "least", cached, prompt.tokens - cached)


# -- by the time to the first token -----------------------------------------------------------------------------

#: an engine is warm for a prompt if it holds this share of it
_WARM: Final = 0.8
#: what makes estimates of a few hundredths of a second nearly equal, so that streams decide where decoding bounds
_FLOOR_S: Final = 0.25
#: costs up to this many times the least are equal
_EQUAL: Final = 1.02
#: of those who wait for a first token, how many will wait for this prompt, too
_BEHIND: Final = 0.4


class _Estimate(Generic[T]):
    __slots__ = ("cached", "candidate", "compute_s", "loads", "ttft_s", "uncached", "waiting")

    def __init__(self, candidate: T, load: Load, ask: Ask, prompt: Prompt, rate: float) -> None:
        self.candidate = candidate
        cached = self.cached = load.index.match(prompt)
        uncached = self.uncached = prompt.tokens - cached if prompt.tokens > cached else 1
        ttft_s = self.compute_s = uncached / rate
        if load.busy:
            tokens, self.waiting = load.backlog(rate, ask.now)
            ttft_s += tokens / rate
        else:
            self.waiting = 0
        self.ttft_s = ttft_s
        self.loads = candidate.unloaded
        if self.loads or load.loading:
            self._load(load, ask)

    def _load(self, load: Load, ask: Ask) -> None:
        """Count the wait until the model is loaded, where it is not."""
        loading = load.loading.get(ask.model)
        if loading is not None and loading.until > ask.now:  # it was asked for: its next prompts wait for it too
            self.loads = False
            self.ttft_s += loading.until - ask.now
        elif self.loads:
            self.ttft_s += PRIOR_LOADING_S if loading is None else loading.seconds

    def choice(self, reason: str) -> Choice[T]:
        return Choice(self.candidate, reason, self.cached, self.uncached, self.ttft_s, self.loads)


def estimated_ttft(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """The least estimated time to the first token."""
    estimates = _estimates(candidates, ask)
    best = min(estimates, key=lambda one: (one.ttft_s, _streams(one.candidate)))
    return best.choice(_reason(best, estimates, ask))


def sticky(candidates: Sequence[T], ask: Ask) -> Choice[T]:
    """Where the prompt is warm, until that engine is so busy that another one is better although it must compute more.

    Engines are compared by the estimated time to the first token, with two thoughts of others. What must be computed
    counts more the more requests wait, for they wait for it, too: a fleet with nothing to spare goes where the caches
    are. And of two that answer about as soon, the one with fewer streams is better for what comes after (the time is
    multiplied by their root), so that a prefix that many ask for spreads over the fleet.
    """
    estimates = _estimates(candidates, ask)
    behind = _BEHIND * sum(one.waiting for one in estimates) / len(estimates)
    costs = [
        (one.ttft_s + behind * one.compute_s + _FLOOR_S)
        * sqrt(one.candidate.upstream.load.streams / one.candidate.upstream.weight + 1)
        for one in estimates
    ]
    least = min(costs)
    first = estimates[costs.index(least)]
    # Learned rates differ by chance: of hosts as good as each other, and as warm, the one that waited longest.
    equal = [
        one for one, cost in zip(estimates, costs, strict=True) if cost <= least * _EQUAL and one.cached >= first.cached
    ]
    best = first if len(equal) == 1 else min(equal, key=_turn)
    return best.choice(_reason(best, estimates, ask))


def _turn(one: _Estimate[Any]) -> tuple[float, float]:
    load: Load = one.candidate.upstream.load
    return load.chosen_at, load.served / one.candidate.upstream.weight


def _reason(best: _Estimate[T], estimates: Sequence[_Estimate[T]], ask: Ask) -> str:
    """ "spill": warm ones were left for it."""
    enough = _WARM * ask.prompt.tokens
    if best.cached >= enough:
        return "warm"
    return "spill" if any(one.cached >= enough for one in estimates) else "cold"


def _estimates(candidates: Sequence[T], ask: Ask) -> list[_Estimate[T]]:
    model, prompt = ask.model, ask.prompt
    loads = [one.upstream.load for one in candidates]
    rates = [load.rate(model) if load.rates else None for load in loads]
    # Of one that has not shown its rate the best is expected: it is tried, and then it has.
    unknown = max((rate for rate in rates if rate), default=PRIOR_RATE)
    estimates = [
        _Estimate(one, load, ask, prompt, rate or unknown)
        for one, load, rate in zip(candidates, loads, rates, strict=True)
    ]
    if not any(one.loads for one in estimates):
        return estimates
    ready = [one for one in estimates if not one.loads]
    loading_s = min((one.ttft_s for one in estimates if one.loads), default=inf)
    # A model is loaded once more only where that is sooner than any wait.
    return ready if ready and min(one.ttft_s for one in ready) <= loading_s else estimates


def _streams(candidate: Candidate) -> tuple[float, float]:
    upstream = candidate.upstream
    return upstream.load.streams / upstream.weight, upstream.load.served / upstream.weight


def _rendezvous(candidate: Candidate, key: str) -> float:
    """The weight of a candidate for `key`: the largest is chosen, each as often as its weight says (Schindelhauer)."""
    upstream = candidate.upstream
    draw = (seed_of(key, upstream.name) + 1) / 2**64
    return -upstream.weight / log(draw) if draw < 1 else inf


DEFAULT: Final = "sticky"
POLICIES: Final[dict[str, Policy[Any]]] = {
    "sticky": sticky,
    "estimated_ttft": estimated_ttft,
    "least_inflight": least_inflight,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
    "weighted": weighted,
    "session": session,
    "bounded_hash": bounded_hash,
    "sglang": sglang,
    "lmetric": lmetric,
}
