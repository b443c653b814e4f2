"""What an answer costs. Arithmetic only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from gateway.wire.usage import Usage

_PER: Final = 1_000_000  # prices are per million tokens
#: sums are kept in whole billionths, which add up exactly: one token at 0.05 per million is 50 of them
NANO: Final = 1_000_000_000


class Price(Protocol):
    """What `gateway.config.Price` has: currency units per million tokens, and per second; None is not known."""

    @property
    def input(self) -> float | None: ...
    @property
    def cached_input(self) -> float | None: ...
    @property
    def output(self) -> float | None: ...
    @property
    def gpu_second(self) -> float | None: ...


def cost(usage: Usage, upstream_s: float, price: Price | None) -> float | None:
    """Currency units for one answer; None where the price of anything that was used is not known.

    Tokens that the runtime had in its cache are charged at `cached_input`, or as input where that is not set. A price
    per GPU second is charged for the whole time the upstream was busy (seconds); token prices beside it are added,
    and those left out are then free.
    """
    if price is None:
        return None
    gpu = price.gpu_second
    total = 0.0 if gpu is None else gpu * upstream_s
    cached_price = price.cached_input if price.cached_input is not None else price.input
    for tokens, per_million in (
        (usage.prompt - usage.cached, price.input),
        (usage.cached, cached_price),
        (usage.completion, price.output),
    ):
        if per_million is not None:
            total += tokens * per_million / _PER
        elif tokens and gpu is None:
            return None
    return total


def nano(amount: float) -> int:
    """`amount` in whole billionths of the currency unit."""
    return round(amount * NANO)


def decimal(amount: float) -> str:
    """As a decimal number without an exponent, down to a billionth: "0.000004210"."""
    return f"{amount:.9f}"
