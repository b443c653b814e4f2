"""Cost arithmetic."""

from __future__ import annotations

import pytest

from gateway.config import Price
from gateway.ledger.prices import cost, decimal, nano
from gateway.wire.usage import Usage


@pytest.mark.parametrize(
    ("usage", "upstream_s", "price", "expected"),
    [
        (Usage(1_000_000, 0), 0.0, Price(input=2.0, output=8.0), 2.0),
        (Usage(0, 500_000), 0.0, Price(input=2.0, output=8.0), 4.0),
        (Usage(1000, 500, cached=800), 0.0, Price(2.0, 0.5, 8.0), (200 * 2.0 + 800 * 0.5 + 500 * 8.0) / 1e6),
        (Usage(1000, 0, cached=800), 0.0, Price(input=2.0, output=8.0), 0.002),  # no price for the cache: as input
        (Usage(10, 10, reasoning=8), 0.0, Price(input=1.0, output=1.0), 20 / 1e6),  # reasoning is output, once
        (Usage(10, 10), 2.5, Price(gpu_second=0.001), 0.0025),
        (Usage(1_000_000, 10), 2.0, Price(input=1.0, gpu_second=0.5), 2.0),
        (Usage(10, 0), 0.0, Price(input=1.0), 0.00001),  # embeddings: nothing was written, so no price is missing
        (Usage(10, 10), 0.0, Price(input=0.0, output=0.0), 0.0),  # free because somebody said so
        (Usage(10, 10), 1.0, None, None),
        (Usage(10, 10), 1.0, Price(), None),
        (Usage(10, 10), 1.0, Price(input=1.0), None),
        (Usage(10, 10), 1.0, Price(output=1.0), None),
        (Usage(10, 10, cached=5), 1.0, Price(cached_input=1.0, output=1.0), None),
    ],
)
def test_cost(usage: Usage, upstream_s: float, price: Price | None, expected: float | None) -> None:
    found = cost(usage, upstream_s, price)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_sums_are_exact_in_billionths() -> None:
    one = cost(Usage(1, 0), 0.0, Price(input=0.05))
    assert one is not None
    assert nano(one) == 50
    assert sum(nano(one) for _ in range(1_000_000)) == nano(0.05)


def test_no_exponent() -> None:
    assert decimal(4.21e-6) == "0.000004210"
    assert decimal(12.5) == "12.500000000"
