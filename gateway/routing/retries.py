"""What each way of failing means for the request and for the upstream, and how often requests may be sent again. Pure.

A prompt may be sent again as long as the client has seen nothing of an answer: it changes nothing where it was sent.
What it costs is the fleet's time, so the times are bounded twice: for each request (`attempts`), and over all of them
(`RetryBudget`), or a fleet that is slow because it has too much to do would be given three times as much. What an
engine had when it died costs no budget: it is work that nobody does any more (`Breaker.took`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """`again`: whether another upstream is asked, or, where there is none, the same one once more. `weight`: how much
    it counts towards ejection; 0 for what is not the upstream's fault. `gone`: there may be nobody any more, which a
    probe can tell.
    """

    again: Literal["never", "elsewhere", "anywhere"]
    weight: int
    gone: bool = False


#: by the outcome of an attempt, as it stands in the record
RULES: Final = {
    "unreachable": Rule("anywhere", 5, gone=True),  # refused: nobody listens there
    "connect_timeout": Rule("elsewhere", 3, gone=True),
    "no_answer": Rule("anywhere", 2, gone=True),  # sent, and not a byte came back
    "broken": Rule("anywhere", 2, gone=True),  # cut before the first content
    "garbled": Rule("elsewhere", 2),  # no HTTP
    "incomplete": Rule("elsewhere", 1),  # ended in order before the first content, as when Ollama's runner dies
    "stream_error": Rule("elsewhere", 1),  # the stream's first event is an error
    "first_byte_timeout": Rule("elsewhere", 2),
    "idle_timeout": Rule("elsewhere", 2),
    "total_timeout": Rule("never", 0),  # the request is as long as it is
    "auth_failed": Rule("elsewhere", 0),  # wrong credential, or its word about this prompt: a 4xx ejects nobody
    "redirect": Rule("elsewhere", 1),
    "busy": Rule("elsewhere", 0),  # 429, or 503 with a Retry-After: it works, and says so
    "unavailable": Rule("elsewhere", 1),  # 503 without a time
    "failed": Rule("elsewhere", 1),  # another 5xx
    "given_up": Rule("never", 0),  # the gateway is shutting down
    "unfit": Rule("never", 0),  # what it said could not follow another's answer
    "client_gone": Rule("never", 0),
    "outrun": Rule("never", 0),  # hedged, and the other attempt was first
}
UNKNOWN: Final = Rule("never", 1)

#: the same upstream once more: a connection may have hit the moment of a restart, or one host behind an address
BACKOFF_S: Final = 0.05
#: an upstream is left alone as long as it asks, up to this
QUIET_MAX_S: Final = 30.0


def backoff_s(attempts: int, chance: float) -> float:
    """How long to wait before the same upstream is asked again, after `attempts`; `chance` is in [0, 1)."""
    return float(BACKOFF_S * 2 ** min(attempts - 1, 6) * (0.5 + chance))


def retry_after_s(text: bytes, now_unix_s: float) -> float | None:
    """Seconds of a `Retry-After` (RFC 9110, section 10.2.3), bounded; None for none, and for what cannot be read."""
    text = text.strip()
    if not text:
        return None
    if text.isdigit():
        return min(QUIET_MAX_S, float(text[:6]))
    from email.utils import parsedate_to_datetime

    try:
        at = parsedate_to_datetime(text.decode("latin-1")).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(QUIET_MAX_S, max(0.0, at - now_unix_s))


class RetryBudget:
    """Tokens: each request brings `part` of one, each retry takes one. A small reserve fills up again at one a second,
    so that a lone user's first failure is tried again, too.
    """

    __slots__ = ("_filled_at", "_tokens", "part", "spent")

    RESERVE: Final = 10.0
    #: what a fleet can have saved up for the moment an engine dies with all it was doing
    SAVED_MAX: Final = 500.0

    def __init__(self, part: float = 0.1) -> None:
        self.part = part
        self._tokens = self.RESERVE if part else 0.0
        self._filled_at = 0.0
        self.spent = 0

    def arrived(self) -> None:
        """A request came."""
        if self._tokens < self.SAVED_MAX:
            self._tokens += self.part

    def take(self, now: float) -> bool:
        """Whether one more retry may be made; it is counted then."""
        if self.part and self._tokens < self.RESERVE:
            self._tokens = min(self.RESERVE, self._tokens + max(0.0, now - self._filled_at))
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        self.spent += 1
        return True

    def __repr__(self) -> str:
        return f"<RetryBudget {self._tokens:.1f} left, {self.spent} spent>"
