"""What this process knows of an upstream's load from its own requests: counted when one is chosen, before the next is.

An engine works through its prompts in the order they came. So the time a new prompt waits is the work before it, less
what has been done of the oldest since it began; and the time from one beginning to the next is the time of one prompt,
from which the prefill rate is learned. Tokens are those of `prefix` (bytes, divided), on both sides alike.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Final

from gateway.routing.prefix import Belief, Index, Prompt

#: tokens per second where no engine of the pool has shown its own: a 32B model on one large GPU
PRIOR_RATE: Final = 8000.0
#: below this a prompt's time says more of the network and of the step that was running than of the rate
_LEARN_TOKENS: Final = 128
_SAMPLES: Final = 32
#: seconds an unloaded model is expected to take until it was seen to
PRIOR_LOADING_S: Final = 10.0


class Rate:
    """A prefill rate learned from samples: their median by tokens, so that outliers and short prompts weigh little."""

    __slots__ = ("_samples", "value")

    def __init__(self) -> None:
        self.value: float | None = None  # tokens per second
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def learn(self, tokens: int, seconds: float) -> None:
        if tokens < _LEARN_TOKENS:
            return
        self._samples.append((tokens / max(seconds, 1e-6), tokens))
        half = sum(tokens for _, tokens in self._samples) / 2
        for rate, weight in sorted(self._samples):
            half -= weight
            self.value = rate
            if half <= 0:
                break


class Load:
    """An upstream's load and what was learned of it. Outlives reloads with its upstream."""

    __slots__ = (
        "_prefills",
        "chosen_at",
        "index",
        "loading",
        "prefill_tokens",
        "rates",
        "reports",
        "served",
        "streams",
    )

    def __init__(self, index: Index | None = None) -> None:
        self.index = index or Index()
        self.streams = 0  # requests in flight
        self.served = 0  # requests ever sent
        self.prefill_tokens = 0  # to be computed, of prompts whose answer has not begun
        self.chosen_at = 0.0
        self.reports = False  # it has told of cached tokens once: from then on none means none
        self.rates: dict[str, Rate] = {}  # by model: a host may serve several
        self.loading: dict[str, Loading] = {}  # by model, where a host loads it when it is asked
        self._prefills: dict[Lease, None] = {}  # in the order they were sent

    @property
    def busy(self) -> bool:
        """There are prompts whose answers have not begun."""
        return bool(self._prefills)

    def backlog(self, rate: float, now: float) -> tuple[float, int]:
        """What is to be computed before a new prompt, at `rate`: tokens, and requests they are of."""
        left: float = self.prefill_tokens
        waiting = len(self._prefills)
        done = -1.0
        for lease in self._prefills:
            if done < 0.0:
                done = (now - lease.started_at) * rate
            if done < lease.uncached:
                return left - done, waiting
            left -= lease.uncached
            if lease.streamed:  # its first content will tell, and has not come yet
                return left, waiting
            done -= lease.uncached
            waiting -= 1
        return left, waiting

    def rate(self, model: str) -> float | None:
        """Prompt tokens per second, None until it is known."""
        learned = self.rates.get(model)
        return None if learned is None else learned.value

    def count(self, now: float) -> None:
        """Count a request of whose prompt nothing is known."""
        self.streams += 1
        self.served += 1
        self.chosen_at = now

    def add(self, lease: Lease) -> int:
        """Count a request, from the moment it is chosen; returns the index's turn up to which all is computed."""
        self.count(lease.sent_at)
        self._retire(lease.sent_at)
        prefills = self._prefills
        settled_at = next(iter(prefills)).turn if prefills else self.index.turn + 1
        prefills[lease] = None
        self.prefill_tokens += lease.uncached
        return settled_at

    def _retire(self, now: float) -> None:
        """Whole answers do not tell when their prompt is computed: it is when its time has passed."""
        while self._prefills:
            head = next(iter(self._prefills))
            ends_at = head.started_at + head.uncached / (self.rate(head.model) or PRIOR_RATE)
            if head.streamed or ends_at > now:
                return
            self.drop_prefill(head, ends_at)

    def drop_prefill(self, lease: Lease, now: float | None) -> None:
        """The prompt is computed, or given up: the next one in line has the engine from `now` on."""
        prefills = self._prefills
        if lease not in prefills:
            return
        was_head = next(iter(prefills)) is lease
        del prefills[lease]
        self.prefill_tokens -= lease.uncached
        if was_head and prefills and now is not None:
            head = next(iter(prefills))
            head.started_at = max(head.started_at, now)

    def learn(self, model: str, tokens: int, seconds: float) -> None:
        rate = self.rates.get(model)
        if rate is None:
            rate = self.rates[model] = Rate()
        rate.learn(tokens, seconds)

    def __repr__(self) -> str:
        return f"<Load {self.streams} streams, {self.prefill_tokens} tokens to compute, {self.index!r}>"


class Loading:
    """A model that a host loads when it is asked: how long that takes, and until when it should be done."""

    __slots__ = ("seconds", "until")

    def __init__(self) -> None:
        self.seconds = PRIOR_LOADING_S
        self.until = 0.0


class Lease:
    """One request on an upstream, counted from its making until `release`. Dropped exactly once.

    `uncached`: prompt tokens that the engine is believed to have to compute. `loads`: the model must be loaded first.
    Not `streamed`: the first content comes with the last, so the prompt counts as computed when its time has passed.
    """

    __slots__ = (
        "_alone",
        "_belief",
        "_load",
        "_loads",
        "began_at",
        "model",
        "sent_at",
        "started_at",
        "streamed",
        "turn",
        "uncached",
    )

    def __init__(
        self,
        load: Load,
        uncached: int,
        now: float,
        model: str = "",
        prompt: Prompt | None = None,
        *,
        loads: bool = False,
        streamed: bool = True,
    ) -> None:
        self._load: Load | None = load
        self.uncached = uncached
        self.model = model
        self.sent_at = now
        self.started_at = now  # when the engine is thought to have come to it
        self.began_at = 0.0  # first content
        self.streamed = streamed
        #: nothing was before it: its time to the first token is its own, and tells the rate
        self._alone = streamed and not loads and not load.prefill_tokens
        self._loads = loads
        self._belief: Belief | None
        if not uncached and prompt is None:  # nothing is known of the prompt, nor asked: there is nobody else
            self._belief = None
            self.turn = -1
            load.count(now)
            return
        settled_at = load.add(self)
        self._belief = None if prompt is None else load.index.use(prompt, settled_at)
        self.turn = load.index.turn
        if loads:
            loading = load.loading.get(model)
            if loading is None:
                loading = load.loading[model] = Loading()
            loading.until = max(loading.until, now + loading.seconds)

    @property
    def believed_cached(self) -> int:
        """Prompt tokens the engine was believed to hold when this was sent."""
        return 0 if self._belief is None else self._belief.cached

    def began(self, now: float) -> None:
        """The first content has come: the prompt is computed. Further calls are ignored."""
        load = self._load
        if load is None or self.began_at:
            return
        self.began_at = now
        load.drop_prefill(self, now)
        if self._alone and self.believed_cached * 8 < self.uncached:
            self._learn(self.uncached)  # else it depends on what the engine says of its cache
        if self._loads:
            loading = load.loading[self.model]
            loading.seconds = max(0.1, now - self.sent_at - self.uncached / (load.rate(self.model) or PRIOR_RATE))
            loading.until = min(loading.until, now)

    def cached(self, tokens: int, prompt_tokens: int) -> None:
        """The engine reports how much of the prompt it held already: the index is mended, the rate may be learned."""
        load, belief = self._load, self._belief
        if load is None or belief is None or prompt_tokens <= 0:
            return
        if tokens > 0:
            load.reports = True
        elif not load.reports:  # most runtimes say nothing of their cache, and that reads as zero
            return
        share = min(1.0, max(0.0, tokens / prompt_tokens))
        load.index.correct(belief, share)
        if self._alone and self.began_at:
            self._learn(round(belief.prompt.tokens * (1.0 - share)))

    def _learn(self, tokens: int) -> None:
        self._alone = False
        if self._load is not None:
            self._load.learn(self.model, tokens, self.began_at - self.started_at)

    def release(self, now: float | None = None) -> None:
        """`now` helps to tell how far the engine is with the prompts behind one that never began."""
        load, self._load = self._load, None
        if load is not None:
            load.streams -= 1
            if self.turn >= 0:
                load.drop_prefill(self, now)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
