"""admission: what a request for a model is estimated to use, asked of the limits before anything is sent."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from gateway.dispatch.plan import Plan
from gateway.exchange import Exchange
from gateway.ledger import prices
from gateway.wire.usage import Usage

if TYPE_CHECKING:
    from gateway.limits.limiter import Limiter


def admit(limiter: Limiter, exchange: Exchange, plan: Plan) -> Awaitable[None] | None:
    """Take what the request is estimated to need. None if that was done without waiting.

    Raises RateLimited or QuotaExceeded, at once or when awaited; then nothing was taken.
    """
    model = plan.offers[0].model
    entry = limiter.entry(exchange, model.name)
    if entry is None:
        return None
    if entry.fixed is not None:
        return limiter.admit(exchange, entry)
    estimates = limiter.estimates
    prompt = estimates.prompt(model.name, exchange.request_bytes)
    unbounded = estimates.output(entry.principal.key_id, model.name)
    asked = plan.body.num_predict if exchange.family == "ollama" else plan.body.max_tokens
    completion = _output_tokens(asked, plan.body.n, exchange.operation, model.context_window, unbounded)
    cost = prices.cost(Usage(prompt, completion), 0.0, model.price) if entry.priced else None
    return limiter.admit(exchange, entry, prompt, completion, cost)


def _output_tokens(asked: int | None, n: int, operation: str, window: int | None, unbounded: int) -> int:
    """The most the answer may have by the request's own word, else `unbounded`; no more than the model can."""
    if operation in ("embeddings", "rerank"):
        return 0
    if asked is None or asked <= 0:  # the runtime judges that; some take -1 for "no limit"
        asked = unbounded
    if window is not None:
        asked = min(asked, window)
    return min(asked, 10**9) * min(max(1, n), 128)
