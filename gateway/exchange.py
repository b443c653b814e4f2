"""Exchange: the one record a request carries from its first byte to the ledger.

Created by the metrics middleware, filled in by each room on the way, read once by `settle`. Times ending in `_at`
are monotonic seconds (`loop.time()`); `began_unix_s` is wall time, for the record only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from gateway.errors import Family, GatewayError
from gateway.wire.usage import Usage

if TYPE_CHECKING:  # the record names these, and imports none of them
    from gateway.config import Price
    from gateway.limits.limiter import Taken
    from gateway.wire.body import Body
    from gateway.wire.usage import Meter

#: English text and JSON run at about four bytes a token.
_BYTES_PER_TOKEN: Final = 4

#: What became of the request. "ok": the upstream's answer reached the client whole (4xx of the upstream included).
#: "client_gone": recorded as status 499. "partial": the answer had begun and was cut.
Outcome = Literal["ok", "refused", "upstream_error", "client_gone", "partial", "internal_error"]


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One upstream that was asked: what came of it (a key of `routing.retries.RULES`, or "ok"), after how many seconds,
    and the status it answered with, 0 if none.
    """

    upstream: str
    outcome: str
    seconds: float
    status: int = 0


class LimitUse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one limit (or the budget) granted a request, in its units, and what the request used of it in the end.

    `source`: who granted it: "loan" (this process, of what the store lent it), "store", "share" (this process alone);
    "observed" and "refused" are limits that had not enough left.
    """

    name: str
    scope: str
    resource: str
    reserved: float
    used: float
    source: str


class Exchange:
    """One request's facts. Slots only: one is made for each request, on the hot path."""

    __slots__ = (
        "attempts",
        "attempts_made",
        "began_at",
        "began_unix_s",
        "believed_cached",
        "body",
        "commented_at",
        "committed",
        "continued",
        "cost",
        "ended_at",
        "error",
        "family",
        "first_byte_at",
        "head_sent",
        "headers",
        "id",
        "key",
        "limits",
        "meter",
        "method",
        "model",
        "model_asked",
        "operation",
        "outcome",
        "path",
        "price",
        "principal",
        "provider",
        "queued_s",
        "rank",
        "remote",
        "request_bytes",
        "response_bytes",
        "route",
        "route_reason",
        "status",
        "stream",
        "taken",
        "ttft_predicted_s",
        "unsent",
        "upstream",
        "upstream_s",
        "usage",
        "waited_s",
    )

    def __init__(self, id: str, method: str, path: str, began_at: float, began_unix_s: float) -> None:
        self.id = id
        self.method = method
        self.path = path
        self.began_at = began_at
        self.began_unix_s = began_unix_s
        self.ended_at = 0.0
        self.first_byte_at = 0.0  # first byte of the upstream's body
        self.upstream_s = 0.0  # time spent waiting for the upstream: connect to its last byte
        self.waited_s = 0.0  # time spent waiting for the client's body
        self.queued_s = 0.0  # time spent waiting for room on an upstream
        #: route template, e.g. "/v1/chat/completions"; "-" for a path that no route has (bounds the labels)
        self.route = "-"
        self.operation = ""  # gen_ai operation: "chat", "text_completion", "embeddings"; "" for the rest
        self.family: Family = "openai"
        self.principal: Any = None  # gateway.identity.principals.Principal, once known
        self.key = ""  # public name of the key
        self.rank = 1  # class in which it waits for room, an index of gateway.queueing.fair.PRIORITIES
        self.body: Body | None = None
        self.model_asked = ""  # as the client wrote it; never a metric label
        self.model = ""  # catalog name after aliases; bounded
        self.taken: Taken | None = None  # of limits; settled at the end
        self.limits: tuple[LimitUse, ...] = ()  # how they were settled
        self.provider = ""
        self.upstream = ""  # public name of the upstream address
        self.stream = False
        self.attempts = 0
        #: those that failed, in order, and then the one that answered; empty if the first did
        self.attempts_made: Sequence[Attempt] = ()
        self.route_reason = ""  # why this upstream, in one word
        self.continued = 0  # times another upstream went on with the answer
        #: when it was chosen: seconds to the first token, None where the policy predicts none, and prompt tokens that
        #: the upstream was believed to have in its cache
        self.ttft_predicted_s: float | None = None
        self.believed_cached: int | None = None
        self.committed = False  # bytes of an answer went to the client: no error can be rendered any more
        #: a stream's head and comments went to the client while it waited, nothing of an answer: errors are events
        self.head_sent = False
        self.commented_at = 0.0  # last of them, or the beginning of the wait
        self.meter: Meter | None = None
        self.usage: Usage | None = None
        self.price: Price | None = None  # of the model at the upstream that answers
        self.cost: float | None = None  # currency units; None while unknown, and where no price is set
        self.status = 0
        self.outcome: Outcome = "ok"
        self.error: GatewayError | None = None
        self.headers = b""  # further header lines of the client's answer, each with its CRLF
        #: the end of the answer: written when the exchange is settled, so who has all of an answer is in the ledger
        self.unsent: Sequence[bytes] = ()
        self.remote = ""
        self.request_bytes = 0
        self.response_bytes = 0

    @property
    def prompt_estimate(self) -> int:
        """The prompt's tokens where nobody counted them."""
        return self.request_bytes // _BYTES_PER_TOKEN

    def __repr__(self) -> str:
        where = f" -> {self.provider}/{self.model}" if self.model else ""
        return f"<Exchange {self.id} {self.method} {self.route}{where} {self.status or '…'} {self.outcome}>"
