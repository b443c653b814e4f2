"""JoinedMeter: one count of an answer that several engines wrote."""

from __future__ import annotations

from gateway.continuation.joint import Joint, Unfit, ending
from gateway.continuation.spoken import Identity, before_error
from gateway.errors import UpstreamBroken
from gateway.wire.usage import Meter, SseMeter, Usage


class Stopped(Exception):
    """The answer is over although its engine goes on; `rest` is the last the client gets."""

    def __init__(self, rest: bytes) -> None:
        super().__init__("a stop string was completed")
        self.rest = rest


class JoinedMeter:
    """`gateway.wire.usage.Meter` of the whole answer: `before` counted what came until the break, `now` counts what
    comes from then on, which `joint` makes a part of the first stream.

    `exact`: the tokens until the break were reported, not counted. `usage_wished`: the client wants the usage chunk.
    """

    __slots__ = ("_before", "_exact", "_identity", "_joint", "_now", "_usage_wished")

    def __init__(
        self,
        before: Meter,
        now: SseMeter,
        joint: Joint,
        identity: Identity | None,
        *,
        exact: bool = False,
        usage_wished: bool = False,
    ) -> None:
        self._before = before
        self._now = now
        self._joint = joint
        self._identity = identity
        self._exact = exact
        self._usage_wished = usage_wished

    @property
    def usage(self) -> Usage | None:
        return None if self._now.usage is None else self.result(0)

    @property
    def events(self) -> int:
        return self._before.events + self._now.events

    @property
    def first_content_at(self) -> float:
        return self._before.first_content_at or self._now.first_content_at

    @property
    def last_content_at(self) -> float:
        return self._now.last_content_at or self._before.last_content_at

    @property
    def finished(self) -> bool:
        return self._now.finished or self._joint.stopped

    @property
    def error(self) -> str | None:
        return self._now.error

    @property
    def torn(self) -> bool:
        return False  # the joint lets whole events through only

    def feed(self, data: bytes, now: float) -> bytes:
        """Raises Stopped, or UpstreamBroken where what comes cannot follow what was said."""
        data = self._now.feed(data, now)
        return self._through(before_error(data) if self._now.error is not None else data)

    def finish(self) -> bytes:
        return self._through(self._now.finish()) + self._joint.finish()

    def _through(self, data: bytes) -> bytes:
        try:
            data = self._joint.feed(data)
        except Unfit as error:
            raise UpstreamBroken(f"what came could not follow what was said: {error}", code="upstream_unfit") from None
        if self._joint.stopped:
            usage = self.result(0)
            counts = (usage.prompt, usage.completion) if self._usage_wished else None
            raise Stopped(data + ending(self._identity, self._joint.chat, "stop", counts))
        return data

    def result(self, prompt_estimate: int) -> Usage:
        """The prompt counts once, and each token of the answer once: what the new stream reports of its prompt has
        the text so far in it. The sum is what was reported; where the one ends and the other begins was counted.
        """
        tokens = self._joint.tokens
        usage = self._now.result(prompt_estimate + tokens)
        usage.prompt = self._joint.of_prompt(usage.prompt)
        usage.completion += tokens
        usage.cached = min(usage.cached, usage.prompt)
        usage.estimated = usage.estimated or not self._exact
        return usage

    def __repr__(self) -> str:
        return f"<JoinedMeter {self._before!r} then {self._now!r}>"
