"""Requests as the limits see them, without sockets: an Exchange, a principal, an estimate."""

from __future__ import annotations

from time import monotonic, time

from gateway.errors import QuotaExceeded, RateLimited
from gateway.exchange import Exchange
from gateway.identity.principals import Principal
from gateway.limits.limiter import Limiter
from gateway.limits.spec import Limit
from gateway.wire.usage import Usage

ALICE = Principal("alice", "alice")
ROUTE = "/v1/chat/completions"


def exchange(who: Principal = ALICE, route: str = ROUTE, began_unix_s: float | None = None) -> Exchange:
    one = Exchange("req-1", "POST", route, monotonic(), time() if began_unix_s is None else began_unix_s)
    one.route = route
    one.principal = who
    return one


async def begin(
    limiter: Limiter, who: Principal = ALICE, prompt: int = 0, completion: int = 0, model: str = "m", **more: float
) -> Exchange:
    """An admitted request; raises what the client would be told."""
    one = exchange(who, began_unix_s=more.get("began_unix_s"))
    entry = limiter.entry(one, model)
    if entry is not None:
        waiting = limiter.admit(one, entry, prompt, completion, more.get("cost"))
        if waiting is not None:
            await waiting
    return one


def end(limiter: Limiter, one: Exchange, usage: Usage | None = None, cost: float | None = None) -> None:
    one.usage = usage
    one.cost = cost
    limiter.settle(one)


async def passes(limiter: Limiter, who: Principal = ALICE, prompt: int = 0, completion: int = 0) -> bool:
    """Whether a request is admitted; one that is runs for no time and uses what was estimated."""
    try:
        one = await begin(limiter, who, prompt, completion)
    except (RateLimited, QuotaExceeded):
        return False
    end(limiter, one, Usage(prompt, completion))
    return True


def requests(burst: int, per_s: float = 1e-6, name: str = "r", **more: object) -> Limit:
    return Limit(name, more.pop("scope", "key"), "requests", burst, per_s, **more)  # type: ignore[arg-type]


def tokens(burst: int, per_s: float = 1e-6, name: str = "t", **more: object) -> Limit:
    return Limit(name, more.pop("scope", "key"), "total_tokens", burst, per_s, **more)  # type: ignore[arg-type]


def slots(burst: int, name: str = "c", **more: object) -> Limit:
    return Limit(name, more.pop("scope", "key"), "concurrent", burst, **more)  # type: ignore[arg-type]
