"""The circuit breaker of one upstream: when it is left alone, and how it comes back. Pure: times come in.

    state       event       next
    closed      tripped     open        too many failures in a row, or too large a part of the answers
    open        cooled      half-open   its time is over: the next request is the one trial
    open        found well  closed      it was gone, and a probe found it back
    half-open   succeeded   closed
    half-open   failed      open        for longer than before
    half-open   found gone  open

An upstream that was gone (nothing listens, or it dropped what it had) is told from one that answers badly: of the first
a probe knows when it is back, of the second only a request does, since engines say they are well while every answer
fails. After its return an upstream gets a growing share of its turns (slow start): its cache is cold, and what
made it fail may not be over.
"""

from __future__ import annotations

from typing import Final, Literal

State = Literal["closed", "open", "half_open"]
Event = Literal["tripped", "cooled", "found_well", "found_gone", "succeeded", "failed"]

#: every pair that is not here leaves the state as it is
NEXT: Final[dict[tuple[State, Event], State]] = {
    ("closed", "tripped"): "open",
    ("closed", "found_gone"): "open",
    ("open", "cooled"): "half_open",
    ("open", "found_well"): "closed",
    ("half_open", "succeeded"): "closed",
    ("half_open", "failed"): "open",
    ("half_open", "found_gone"): "open",
}

#: failures in a row, each counted with its weight, that open it
IN_A_ROW: Final = 5
#: or this part of at least so many answers within WINDOW_S
FAILED_PART: Final = 0.5
AT_LEAST: Final = 20
WINDOW_S: Final = 10.0
#: how long it stays open: doubled each time until it has stayed closed for CALM_S
OPEN_S: Final = 1.0
OPEN_MAX_S: Final = 30.0
CALM_S: Final = 60.0
#: a trial that says nothing for so long does not keep others from trying
TRIAL_S: Final = 5.0
#: for so long after a probe found nobody there, no request is spent on finding out
FOUND_S: Final = 15.0
SLOW_START_S: Final = 10.0
FIRST_SHARE: Final = 0.1


class Breaker:
    """`clear`: closed and at its full share, the one thing that the choice reads of a healthy upstream."""

    __slots__ = (
        "_answered",
        "_closed_at",
        "_credit",
        "_failed",
        "_found_at",
        "_in_a_row",
        "_open_s",
        "_trial_at",
        "_until",
        "_window_at",
        "changed_at",
        "clear",
        "gone",
        "opened",
        "state",
    )

    def __init__(self) -> None:
        self.state: State = "closed"
        self.clear = True
        self.gone = False  # opened because nothing was there to answer
        self.opened = 0  # times
        self.changed_at = 0.0
        self._in_a_row = 0
        self._answered = 0
        self._failed = 0
        self._window_at = 0.0
        self._found_at = -FOUND_S  # gone, by the last probe
        self._open_s = OPEN_S
        self._until = 0.0  # open: when the trial may be made
        self._trial_at = 0.0  # half-open: when it was begun, 0.0 for not yet
        self._closed_at = 0.0
        self._credit = 0.0  # slow start: turns saved up

    # -- may it be asked? -------------------------------------------------------------------------------------------

    def allows(self, now: float) -> bool:
        """Whether the next request may go here. Asked for candidates only: each time counts as a turn in slow start."""
        if self.clear:
            return True
        if self.state == "closed":
            share = self.share(now)
            if share >= 1.0:
                self.clear = True
                return True
            self._credit += share
            if self._credit < 1.0:
                return False
            self._credit -= 1.0
            return True
        if self.state == "open" and now >= self._until and not (self.gone and now - self._found_at < FOUND_S):
            self._move("cooled", now)
        return self.state == "half_open" and (not self._trial_at or now - self._trial_at >= TRIAL_S)

    def share(self, now: float) -> float:
        """The part of its turns it gets at `now`: 0.0 while it is ejected, 1.0 when it is whole again."""
        if self.state != "closed":
            return 0.0
        if self.clear:
            return 1.0
        return min(1.0, FIRST_SHARE + (1.0 - FIRST_SHARE) * (now - self._closed_at) / SLOW_START_S)

    def chosen(self, now: float) -> None:
        """A request goes here; on trial it is the trial."""
        if self.state == "half_open":
            self._trial_at = now

    def took(self, sent_at: float) -> bool:
        """Whether what was sent at `sent_at` was lost with it: it was gone then or later, and is not back. Asked again,
        that is no more work for the fleet than it was.
        """
        return self.gone and self.state == "open" and sent_at <= self.changed_at

    # -- what became of it ------------------------------------------------------------------------------------------

    def succeeded(self, now: float) -> bool:
        """An answer began as it should. True if that changed the state."""
        self._in_a_row = 0
        self._answered += 1
        return False if self.clear else self._move("succeeded", now)

    def failed(self, now: float, weight: int = 1, *, gone: bool = False) -> bool:
        """A request failed by the upstream's fault. True if that changed the state.

        `weight`: how much one such failure proves. `gone`: there was nobody, rather than a bad answer.
        """
        if now - self._window_at > WINDOW_S:
            self._window_at = now
            self._answered = self._failed = 0
        self._in_a_row += weight
        self._failed += 1
        if self.state == "half_open":
            self._trial_at = 0.0
            self.gone = gone
            return self._move("failed", now)
        total = self._answered + self._failed
        if self._in_a_row < IN_A_ROW and (total < AT_LEAST or self._failed < FAILED_PART * total):
            return False
        self.gone = gone if self.state == "closed" else self.gone and gone
        return self._move("tripped", now)

    def neutral(self) -> None:
        """A request ended without a word about the upstream: its client left, or it was told to come later."""
        self._trial_at = 0.0

    def found_well(self, now: float) -> bool:
        """A probe was answered. True if that changed the state."""
        return self.gone and self.state == "open" and self._move("found_well", now)

    def found_gone(self, now: float) -> bool:
        """Probes found nobody there. True if that changed the state."""
        self.gone = True
        self._found_at = now
        return self.state != "open" and self._move("found_gone", now)

    def _move(self, event: Event, now: float) -> bool:
        state = NEXT.get((self.state, event))
        if state is None:
            return False
        if state == "open":
            # It comes back too early if it was well for less than a while: wait longer this time.
            calm = self.state == "closed" and now - self._closed_at >= CALM_S
            self._open_s = OPEN_S if calm or not self.opened else min(OPEN_MAX_S, 2 * self._open_s)
            self._until = now + self._open_s
            self.opened += 1
            self.clear = False
        elif state == "closed":
            self._closed_at = now
            self._credit = 1.0  # its first turn comes at once
            self._in_a_row = 0
            self._answered = self._failed = 0
            self.gone = False
        self._trial_at = 0.0
        self.state = state
        self.changed_at = now
        return True

    def __repr__(self) -> str:
        why = " gone" if self.gone else ""
        return f"<Breaker {self.state}{why}, {self._in_a_row} failures in a row>"
