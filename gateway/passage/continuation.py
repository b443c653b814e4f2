"""Continuation: what is kept of a streamed answer that could go on elsewhere, and asking another upstream to do so.

It is decided when a stream begins whether it might be continued: by its request, and by whether its pool has another
engine that could. One that cannot costs nothing more. What was relayed is kept as text. When the engine fails (its
connection breaks, it falls silent, it reports an error, it ends without an end), the rest is asked of another, and the
relay goes on with that reply.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from aiohttp import web

from gateway.catalog import Offer
from gateway.continuation.joint import Joint, ending
from gateway.continuation.meter import JoinedMeter
from gateway.continuation.request import Finished, continuable, for_the_rest, stop_strings
from gateway.continuation.spoken import FIRST_BYTES, UNREAD_BYTES, Spoken, before_error, to_tell
from gateway.dispatch.plan import Plan
from gateway.errors import GatewayError, UpstreamError, UpstreamGivenUp, UpstreamInterrupted
from gateway.exchange import Exchange
from gateway.passage.waiting import Comments
from gateway.upstreams.reply import Reply
from gateway.wire.opening import reported
from gateway.wire.usage import Meter, SseMeter

if TYPE_CHECKING:
    from gateway.dispatch.dispatcher import Dispatch

_log = logging.getLogger("gateway.continuation")

#: failures that another engine would have, too
_IN_VAIN: Final = frozenset({"upstream_total_timeout", "upstream_unfit"})


class Resumed(NamedTuple):
    """The answer goes on: `reply` has the rest of it, `meter` counts all of it."""

    reply: Reply
    meter: Meter


class Continuations:
    """Whether answers are continued, and what came of it.

    `counts`: "joined", another engine took over; "completed", only the end of the stream was missing; "unfit", the
    answer was no plain text; "failed", nobody could go on.
    """

    def __init__(self, enabled: bool = True, comments: Comments | None = None) -> None:
        self.enabled = enabled
        self.comments = comments or Comments(0)
        self.counts = {"joined": 0, "completed": 0, "unfit": 0, "failed": 0}

    def begin(self, exchange: Exchange, plan: Plan, dispatch: Dispatch, reply: Reply) -> Continuation | None:
        """What is to be kept of this answer; None if nothing could go on with it."""
        if not self.enabled or not exchange.stream or reply.status != 200 or not _events(reply):
            return None
        operation = plan.operation
        if operation not in ("chat", "completions") or exchange.family != "openai":
            return None
        chat = operation == "chat"
        if not _another(dispatch) or not continuable(plan.body, chat):
            return None
        if reply.opening is not None and reported(reply.opening) is not None:  # the request's own error, and all of it
            return None
        return Continuation(self, exchange, plan, dispatch, reply, chat)


class Continuation:
    """One answer's; see the module's docstring."""

    __slots__ = (
        "_chat",
        "_comments",
        "_counts",
        "_default",
        "_dispatch",
        "_exchange",
        "_models",
        "_plan",
        "_prompt",
        "_sent_at",
        "_unasked",
        "reason",
        "spoken",
    )

    def __init__(
        self, whole: Continuations, exchange: Exchange, plan: Plan, dispatch: Dispatch, reply: Reply, chat: bool
    ) -> None:
        runtime = dispatch.offer.upstream.runtime
        self._counts = whole.counts
        self._comments = whole.comments
        self._exchange = exchange
        self._plan = plan
        self._dispatch = dispatch
        self._chat = chat
        self._models = {offer.model.name for offer in dispatch.tier}  # another model's engines are another voice
        self._unasked = runtime.continues == "always"
        self._default = None if chat else runtime.completion_tokens
        self._sent_at = reply.sent_at
        self._prompt: int | None = None  # the prompt's tokens, where they were reported
        self.spoken = Spoken()
        self.reason = ""  # why nobody goes on, for the client: it may have an upstream's words

    def feed(self, meter: Meter) -> Callable[[bytes, float], bytes]:
        """`meter.feed`, and what it lets through is kept; an error that the upstream reports is not let through."""
        count = meter.feed
        spoken = self.spoken
        unread = spoken.unread
        keep = unread.append
        unread_bytes = UNREAD_BYTES - FIRST_BYTES  # so soon is it learnt how the events look

        def feed(data: bytes, now: float) -> bytes:
            nonlocal unread_bytes
            data = count(data, now)
            if meter.error is not None:
                rest = before_error(data)
                keep(rest)
                provider = self._exchange.provider
                error = UpstreamInterrupted(f"provider {provider!r} failed in the middle of its answer: {meter.error}")
                error.rest = rest
                raise error
            if data:
                keep(data)
                unread_bytes += len(data)
                if unread_bytes >= UNREAD_BYTES:
                    unread_bytes = 0
                    spoken.read()
            return data

        return feed

    async def go_on(self, request: web.BaseRequest, broken: UpstreamError, meter: Meter) -> Resumed | bytes | None:
        """After `broken`: the reply to go on with, or the last bytes of an answer that lacked nothing but its end.

        None if this is the end, and `reason` says why.
        """
        if isinstance(broken, UpstreamGivenUp):
            return None
        spoken = self.spoken
        spoken.read()
        if not spoken.plain or meter.torn or broken.code in _IN_VAIN:
            self.reason = "" if spoken.plain else "it is not plain text"
            self._ended("unfit", broken)
            return None
        said = spoken.text
        told = to_tell(said)
        usage = meter.usage
        made = spoken.tokens if usage is None else max(spoken.tokens, usage.completion)
        exact = usage is not None and usage.completion == made and not usage.estimated
        if exact and usage is not None and usage.prompt:
            self._prompt = usage.prompt
        tokens = made - spoken.blanks
        if spoken.finished:
            return self._end(meter, None, broken)
        body = self._plan.body
        try:
            asked = for_the_rest(body, self._chat, told, tokens, unasked=self._unasked, default=self._default)
        except Finished:
            return self._end(meter, "length", broken)
        if asked is None:
            self.reason = "its last message cannot be added to"
            self._ended("unfit", broken)
            return None
        first_byte_at = self._exchange.first_byte_at
        self._exchange.head_sent = True
        commented = self._comments.begin(request, self._exchange, self._plan)  # the new engine reads all of it first
        try:
            reply = await self._dispatch.another(asked, broken, self._can)
        except GatewayError as error:
            self.reason = error.message
            self._ended("failed", broken)
            return None
        finally:
            self._exchange.first_byte_at = first_byte_at
            if commented:
                self._comments.end(self._exchange)
        self._exchange.continued += 1
        reply.sent_at = self._sent_at  # the deadline for all of it began then
        self._ended("joined", broken)
        now = SseMeter(self._plan.strip_usage)
        joint = Joint(
            spoken.identity,
            self._chat,
            said=said,
            told=told,
            stops=stop_strings(body),
            tokens=tokens,
            prompt=self._prompt,
        )
        joined = JoinedMeter(meter, now, joint, spoken.identity, exact=exact, usage_wished=body.include_usage)
        return Resumed(reply, joined)

    def _can(self, offer: Offer) -> bool:
        """Whether this upstream can be asked for the rest."""
        if offer.model.name not in self._models or not _goes_on(offer):
            return False
        # A completion without a length gets the runtime's own: that must be the one it began with.
        same = self._chat or offer.upstream.runtime.completion_tokens == self._default
        return same or self._plan.body.present("max_tokens")

    def _end(self, meter: Meter, finish: str | None, broken: UpstreamError) -> bytes:
        self._ended("completed", broken)
        if self.spoken.done:
            return b""
        counts = None
        if self._plan.body.include_usage and meter.usage is None:
            usage = meter.result(self._exchange.prompt_estimate)
            counts = (usage.prompt, usage.completion)
        return ending(self.spoken.identity, self._chat, finish, counts)

    def _ended(self, outcome: str, broken: UpstreamError) -> None:
        self._counts[outcome] += 1
        broken.__traceback__ = None  # its frames hold the request: a cycle
        exchange = self._exchange
        _log.warning(
            "%s broke off after %d tokens (%s): %s",
            exchange.id,
            self.spoken.tokens,
            broken.code,
            f"joined by {exchange.upstream}" if outcome == "joined" else outcome,
        )


def _another(dispatch: Dispatch) -> bool:
    """Whether the pool has an upstream that could go on with what this one says. One that died is not back so soon."""
    mine = dispatch.offer.upstream
    return any(offer.upstream is not mine and _goes_on(offer) for offer in dispatch.tier)


def _goes_on(offer: Offer) -> bool:
    chosen = offer.model.continues
    return offer.upstream.runtime.continues != "" if chosen is None else chosen


def _events(reply: Reply) -> bool:
    return reply.head.content_type.lower().startswith(b"text/event-stream")
