"""Marks: what a journal holds of requests that have not ended, and how it is encoded."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from gateway.ledger.record import encode

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.ledger.prices import Price

#: a prompt's tokens where nobody counted them, as everywhere in the gateway
_BYTES_PER_TOKEN: Final = 4
_KEPT: Final = 4096


class Prices(msgspec.Struct, frozen=True, array_like=True):
    """The price a request was admitted at; fields as in `gateway.config.Price`."""

    input: float | None
    cached_input: float | None
    output: float | None
    gpu_second: float | None


class Opened(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request as it was admitted: what its record needs if it never ends."""

    id: str
    at: float
    route: str
    method: str
    key: str
    group: str
    model: str
    provider: str
    upstream: str
    stream: bool
    attempts: int
    request_bytes: int
    price: Prices | None


class _Constant(NamedTuple):
    """What is encoded once of an `Opened`: its names, and its prices with what ends it; `price` as it was then."""

    price: Price | None
    names: bytes
    prices: bytes


class Progress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an open stream has used after `elapsed_s`."""

    id: str
    prompt: int
    completion: int
    cached: int
    reasoning: int
    elapsed_s: float


class Marks:
    """Encodes marks, and remembers what is the same in many."""

    __slots__ = ("_constants",)

    def __init__(self) -> None:
        self._constants: dict[tuple[str, ...], _Constant] = {}

    def opened(self, exchange: Exchange) -> bytes:
        """An `Opened` of the exchange, encoded."""
        group = exchange.principal.group if exchange.principal is not None else ""
        # Most of it is the same for each request of a key to a model: encoded once.
        names = (exchange.key, group, exchange.route, exchange.model, exchange.provider, exchange.upstream)
        constant = self._constants.get(names)  # a route has one method
        if constant is None or constant.price is not exchange.price:
            if len(self._constants) >= _KEPT:
                self._constants.clear()
            constant = self._constants[names] = _constant(exchange, group)
        return b'["%b",%r,%b%b,%d,%d%b' % (
            exchange.id.encode(),
            exchange.began_unix_s,
            constant.names,
            b"true" if exchange.stream else b"false",
            exchange.attempts,
            exchange.request_bytes,
            constant.prices,
        )


def _constant(exchange: Exchange, group: str) -> _Constant:
    price = exchange.price
    names = [exchange.route, exchange.method, exchange.key, group, exchange.model, exchange.provider, exchange.upstream]
    prices = None if price is None else Prices(price.input, price.cached_input, price.output, price.gpu_second)
    return _Constant(price, encode(names)[1:-1] + b",", b"," + encode(prices) + b"]")


def progress(exchange: Exchange) -> bytes:
    """A `Progress` of the exchange, encoded; it has a meter."""
    assert exchange.meter is not None
    usage = exchange.meter.result(exchange.request_bytes // _BYTES_PER_TOKEN)
    elapsed_s = monotonic() - exchange.began_at
    mark = Progress(exchange.id, usage.prompt, usage.completion, usage.cached, usage.reasoning, round(elapsed_s, 6))
    return encode(mark)
