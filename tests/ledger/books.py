"""What the ledger's tests share: exchanges as the gateway makes them, and journals as a dead process leaves them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic, time

from gateway.config import Price
from gateway.exchange import Exchange
from gateway.identity.principals import Principal
from gateway.ledger.journal import Journal
from gateway.ledger.record import Record, record
from gateway.wire.usage import Usage, new_meter
from tests.journeys.stage import event

PRICE = Price(input=2.0, output=8.0)


def exchange(number: int, *, stream: bool = False, key: str = "client", began_unix_s: float = 0.0) -> Exchange:
    """A request as it stands when its upstream is about to be asked."""
    one = Exchange(f"req-{number:06d}", "POST", "/v1/chat/completions", monotonic(), began_unix_s or time())
    one.route = one.path
    one.operation = "chat"
    one.principal = Principal(key, key, group="team")
    one.key = key
    one.model, one.provider, one.upstream = "sim", "one", "one"
    one.price = PRICE
    one.attempts = 1
    one.stream = stream
    one.request_bytes = 400
    if stream:
        one.meter = new_meter("text/event-stream")
    return one


def streamed(one: Exchange, tokens: int) -> None:
    """The meter has seen so many tokens."""
    assert one.meter is not None
    for _ in range(tokens):
        one.meter.feed(event("a"), monotonic())


def finished(one: Exchange, prompt: int = 100, completion: int = 10) -> Record:
    one.status = 200
    one.ended_at = monotonic()
    one.usage = Usage(prompt, completion)
    one.cost = (prompt * 2.0 + completion * 8.0) / 1e6
    return record(one)


@asynccontextmanager
async def journal(root: Path, **options: int) -> AsyncIterator[Journal]:
    """A journal that is open for the block."""
    one = Journal(root, **options)
    one.start()
    try:
        yield one
    finally:
        await one.close()


async def died(one: Journal) -> None:
    """What kill -9 leaves: the files as they are, and the lock free."""
    assert one._timer is not None
    one._timer.cancel()
    one._timer = None
    if one._sync is not None:
        await asyncio.wait([one._sync])
    os.close(one._fd)
    os.close(one._lock_fd)
    one._fd = -1
