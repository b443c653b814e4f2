"""How often an address may be wrong about a key, before anything is asked of a store.

Each address (of IPv6 its /64 network, which one customer has whole) has a bucket of wrong keys. When it is empty,
keys from there are no longer looked at, but for those that this address used while it had a bucket: many clients may
share one address behind a proxy, and one of them that keeps sending an old key must not shut out the others. A request
without a key is no guess and costs nothing.

Loopback is treated like any address: a proxy on the same host makes every client look like it.

Small and bounded: `ADDRESSES_MAX` addresses, the one that failed longest ago gives way. Time is passed in (monotonic).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

ADDRESSES_MAX: Final = 10_000
_SEEN_MAX: Final = 100


class Failing:
    """An address that failed lately: `tokens` left at `at`, and the ids of the keys it used rightly since."""

    __slots__ = ("at", "seen", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.seen: set[str] = set()


class Failures:
    """`per_min` wrong keys a minute and address, twice as many at once; 0 never refuses. Empty in good times."""

    __slots__ = ("_addresses_max", "_burst", "_per_s", "addresses", "counts")

    def __init__(self, per_min: int, addresses_max: int = ADDRESSES_MAX) -> None:
        self.revise(per_min)
        self._addresses_max = addresses_max
        self.addresses: OrderedDict[str, Failing] = OrderedDict()
        #: refused requests by reason: no key sent, a key that is not known, a key not looked at
        self.counts = {"missing": 0, "unknown": 0, "limited": 0}

    def revise(self, per_min: int) -> None:
        """Allow so many from now on."""
        self._per_s = per_min / 60
        self._burst = 2.0 * per_min

    def find(self, remote: str | None, now: float) -> Failing | None:
        """What is remembered of a client's address; None if it did not fail lately."""
        address = address_of(remote)
        found = self.addresses.get(address)
        if found is None:
            return None
        found.tokens = min(self._burst, found.tokens + (now - found.at) * self._per_s)
        found.at = now
        if found.tokens >= self._burst:
            del self.addresses[address]
            return None
        return found

    def wait_s(self, failing: Failing) -> float:
        """How long until a key from there is looked at again; 0 for now. Asked after `find`."""
        return 0.0 if failing.tokens >= 1.0 else (1.0 - failing.tokens) / self._per_s

    def right(self, failing: Failing, key_id: str) -> None:
        """A key from there was right."""
        if len(failing.seen) < _SEEN_MAX:
            failing.seen.add(key_id)

    def wrong(self, remote: str | None, now: float) -> None:
        """A key from there was wrong."""
        self.counts["unknown"] += 1
        if not self._per_s:
            return
        address = address_of(remote)
        found = self.addresses.get(address)
        if found is None:
            found = self.addresses[address] = Failing(self._burst, now)
            if len(self.addresses) > self._addresses_max:
                self.addresses.popitem(last=False)
        found.tokens -= 1.0
        self.addresses.move_to_end(address)


def address_of(remote: str | None) -> str:
    """What is counted as one client address: an IPv4 address, or an IPv6 network of 64 bits."""
    if remote is None or ":" not in remote:
        return remote or ""
    try:
        address = ipaddress.IPv6Address(remote.partition("%")[0])
    except ValueError:
        return remote
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"
