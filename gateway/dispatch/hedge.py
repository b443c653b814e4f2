"""hedge: a second attempt beside one that says nothing; what `dispatch` needs to race them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gateway.catalog import Offer
from gateway.dispatch.verdict import fault_of
from gateway.errors import UpstreamError
from gateway.exchange import Attempt
from gateway.upstreams.reply import Reply
from gateway.upstreams.upstream import Lease


@dataclass(frozen=True, slots=True)
class Rival:
    """The second attempt while it runs."""

    offer: Offer
    lease: Lease
    task: asyncio.Task[Reply]
    sent_at: float
    strip_usage: bool
    tier: int

    def attempt(self, outcome: str, now: float) -> Attempt:
        return Attempt(self.offer.upstream.name, outcome, round(now - self.sent_at, 6))

    def drop(self, now: float) -> None:
        drop(self.task)
        self.lease.release(now)


def failure(task: asyncio.Task[Reply], offer: Offer) -> UpstreamError | None:
    """What went wrong with an attempt that has ended; None for an answer, and while it runs."""
    if not task.done():
        return None
    error = task.exception()
    if error is None:
        return fault_of(task.result(), offer)
    if isinstance(error, UpstreamError):
        return error
    raise error


def answered(task: asyncio.Task[Reply], offer: Offer) -> bool:
    """Whether an attempt has begun to answer the request."""
    return task.done() and failure(task, offer) is None


def drop(task: asyncio.Task[Reply]) -> None:
    """Give an attempt up: its connection is closed, now or in the turn in which it ends."""
    task.cancel()
    task.add_done_callback(_close)


def _close(task: asyncio.Task[Reply]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
