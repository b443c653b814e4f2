"""Record: the facts of one finished request, as they are kept and as they are logged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

import msgspec

from gateway.exchange import Attempt, Exchange, LimitUse

#: a float is left out as the default only if it is this very object
_ZERO: Final = 0.0


class Record(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One request. Times in seconds; `at` is Unix time when the request began. No prompt, no answer, no secret.

    `status` is what the client was told, 499 where it had left. Token counts are what the upstream reported, or
    counted from the answer's events, then `estimated` is true; null where the request never reached a model. `cost` is
    in currency units; null where no model was reached, and where the price of what was used is not known. Fields with a
    default are left out where they have it.
    """

    at: float
    request_id: str
    route: str
    method: str
    status: int
    outcome: str
    key: str
    model: str
    provider: str
    upstream: str
    stream: bool
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    estimated: bool
    ttft_s: float | None
    tpot_s: float | None
    duration_s: float
    upstream_s: float
    request_bytes: int
    response_bytes: int
    error: str | None
    group: str = ""
    cost: float | None = None
    client: str = ""  # address the request came from
    model_asked: str = ""  # as the client wrote it, where that is not `model`
    attempts_made: tuple[Attempt, ...] = ()  # where there was more than one
    route_reason: str = ""
    continued: int = 0  # times another upstream went on with the answer
    limits: tuple[LimitUse, ...] = ()  # arrays: name, scope, resource, reserved, used, source
    queued_s: float = _ZERO  # of the duration: the wait for room on an upstream
    ttft_predicted_s: float | None = None  # from the choice of the upstream on; null where nothing had to be predicted
    believed_cached_tokens: int | None = None  # of the prompt, when the upstream was chosen, by the gateway's count


#: a record as it lies in the journal and the store, and as its log line
encode = msgspec.json.Encoder().encode


def record(exchange: Exchange) -> Record:
    """The exchange as it ended. Call it once `ended_at`, `status` and `usage` are final."""
    usage = exchange.usage
    meter = exchange.meter
    first_at = exchange.first_byte_at
    between = None
    if meter is not None and meter.events:
        first_at = meter.first_content_at
        if meter.events > 1:
            between = _rounded((meter.last_content_at - first_at) / (meter.events - 1))
    return Record(
        _rounded(exchange.began_unix_s),
        exchange.id,
        exchange.route,
        exchange.method,
        exchange.status,
        exchange.outcome,
        exchange.key,
        exchange.model,
        exchange.provider,
        exchange.upstream,
        exchange.stream,
        exchange.attempts,
        usage.prompt if usage is not None else None,
        usage.completion if usage is not None else None,
        usage.cached if usage is not None else None,
        usage.reasoning if usage is not None else None,
        usage.estimated if usage is not None else False,
        _rounded(first_at - exchange.began_at) if first_at else None,
        between,
        _rounded(exchange.ended_at - exchange.began_at),
        _rounded(exchange.upstream_s),
        exchange.request_bytes,
        exchange.response_bytes,
        exchange.error.code if exchange.error is not None else None,
        exchange.principal.group if exchange.principal is not None else "",
        exchange.cost,
        exchange.remote,
        exchange.model_asked[:200] if exchange.model_asked != exchange.model else "",
        tuple(exchange.attempts_made),
        exchange.route_reason,
        exchange.continued,
        exchange.limits,
        queued_s=_rounded(exchange.queued_s) if exchange.queued_s else _ZERO,
        ttft_predicted_s=None if exchange.ttft_predicted_s is None else _rounded(exchange.ttft_predicted_s),
        believed_cached_tokens=exchange.believed_cached,
    )


def _rounded(seconds: float) -> float:
    """To the microsecond; a third of what `round` costs."""
    return int(seconds * 1e6) / 1e6


class Recent:
    """The newest records, oldest first; what falls out at the far end is gone."""

    def __init__(self, size: int = 100) -> None:
        self._records: deque[Record] = deque(maxlen=size)
        self.post = self._records.append

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
