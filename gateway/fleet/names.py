"""DNS names that stand for several hosts: looked up again and again, each answer handed to the Catalog.

A "host" lookup asks for A and AAAA records, "srv" for SRV records (RFC 2782: the hosts of the lowest priority, by their
weights). Where no DNS server is configured, addresses come from the system's resolver, hosts file included, which tells
no TTL; a DNS server's TTL brings the next look-up forward, never below TTL_MIN_S.

The last good answer stays while a name cannot be looked up, and also when it has no records: a host that is really gone
is found by its probes, while an empty answer is mostly a mistake of a moment.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from gateway.catalog import Catalog, Host
from gateway.config import Listen, Lookup

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver
    from dns.resolver import Answer

_log = logging.getLogger("gateway.fleet")

TIMEOUT_S: Final = 3.0
TTL_MIN_S: Final = 1.0
#: after a failure, or sooner if names are looked up more often
RETRY_S: Final = 2.0
#: what a start waits for the first answers
START_S: Final = 2.0


class NoAnswer(Exception):
    """A name could not be looked up, and why."""


class Known:
    """What became of one name's look-ups: when it last failed after it had not, and why; "" while it does not."""

    __slots__ = ("answered", "failed", "hosts", "since", "trouble")

    def __init__(self) -> None:
        self.hosts: tuple[Host, ...] = ()
        self.answered = 0
        self.failed = 0
        self.trouble = ""
        self.since = 0.0


class Names:
    """Follows the names in `catalog`. `on_change` is told after the hosts behind one have changed."""

    def __init__(self, catalog: Catalog, on_change: Callable[[], None]) -> None:
        self._catalog = catalog
        self._on_change = on_change
        self._refresh_s = 10.0
        self._server: Listen | None = None
        self._tasks: dict[Lookup, asyncio.Task[None]] = {}
        self._resolver: Resolver | None = None
        self.known: dict[Lookup, Known] = {}

    async def start(self, refresh_s: float, server: Listen | None) -> None:
        """Begin; comes back when every name was asked once, or after START_S. Needs the running loop."""
        self.follow(refresh_s, server)
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        while any(not one.answered + one.failed for one in self.known.values()) and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def follow(self, refresh_s: float, server: Listen | None) -> None:
        """Look up the names that the catalog has now, from now on in this way."""
        if (refresh_s, server) != (self._refresh_s, self._server):
            self._refresh_s, self._server = refresh_s, server
            self._resolver = None
            self._end(tuple(self._tasks))
        wanted = self._catalog.lookups
        self._end([lookup for lookup in self._tasks if lookup not in wanted])
        self.known = {lookup: self.known.get(lookup) or Known() for lookup in wanted}
        for lookup in wanted:
            if lookup not in self._tasks:
                self._tasks[lookup] = asyncio.create_task(self._run(lookup), name=f"look-ups of {lookup}")

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._end(tuple(self._tasks))
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def troubles(self) -> list[str]:
        """What is wrong, in words for an operator."""
        return [
            f"{lookup} cannot be looked up for {monotonic() - one.since:.0f} s ({one.trouble}); "
            + (f"its last {len(one.hosts)} hosts are asked" if one.hosts else "no host of it is known")
            for lookup, one in self.known.items()
            if one.trouble
        ]

    def _end(self, lookups: Sequence[Lookup]) -> None:
        for lookup in lookups:
            self._tasks.pop(lookup).cancel()

    async def _run(self, lookup: Lookup) -> None:
        while True:
            known = self.known[lookup]
            wait_s = self._refresh_s
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    hosts, ttl_s = await self._look_up(lookup)
            except (NoAnswer, TimeoutError) as error:
                self._failed(lookup, known, str(error) or f"no answer within {TIMEOUT_S:g} s")
                wait_s = min(wait_s, RETRY_S)
            except Exception as error:  # one defect must not end the following of a name
                self._failed(lookup, known, type(error).__name__)
                wait_s = min(wait_s, RETRY_S)
            else:
                self._answered(lookup, known, hosts)
                if ttl_s is not None:
                    wait_s = min(wait_s, max(TTL_MIN_S, ttl_s))
            await asyncio.sleep(wait_s)

    def _answered(self, lookup: Lookup, known: Known, hosts: tuple[Host, ...]) -> None:
        known.answered += 1
        if known.trouble:
            _log.info("%s can be looked up again", lookup)
            known.trouble = ""
        if hosts != known.hosts:
            known.hosts = hosts
            _log.info("%s is %s", lookup, ", ".join(host.address or urlsplit(host.base_url).netloc for host in hosts))
            self._catalog.found(lookup, hosts)
            self._on_change()

    def _failed(self, lookup: Lookup, known: Known, why: str) -> None:
        known.failed += 1
        if not known.trouble:
            known.since = monotonic()
            _log.warning("%s cannot be looked up: %s", lookup, why)
        known.trouble = why

    # -- asking -----------------------------------------------------------------------------------------------------

    async def _look_up(self, lookup: Lookup) -> tuple[tuple[Host, ...], float | None]:
        """The hosts, in an order that does not depend on the answer's, and its TTL. Raises NoAnswer."""
        name = urlsplit(lookup.base_url).hostname or ""
        if lookup.kind == "srv":
            return await self._services(name, lookup.base_url)
        if self._server is None:
            addresses, ttl_s = await _system_addresses(name), None
        else:
            addresses, ttl_s = await self._addresses(name)
        return tuple(Host(lookup.base_url, address) for address in addresses), ttl_s

    async def _services(self, name: str, base_url: str) -> tuple[tuple[Host, ...], float | None]:
        answer = await self._ask(name, "SRV")
        records = [record for record in answer if str(record.target) != "."] if answer is not None else []
        if answer is None or not records:
            raise NoAnswer("it has no SRV records")
        first = min(record.priority for record in records)
        ttl_s = float(answer.rrset.ttl) if answer.rrset is not None else None
        hosts: list[tuple[str, str, int]] = []
        url = urlsplit(base_url)
        trouble = None
        for record in records:
            if record.priority > first:
                continue
            target = str(record.target).rstrip(".")
            base = f"{url.scheme}://{target}:{record.port}{url.path}"
            if self._server is None:  # found when it is connected to
                hosts.append((base, "", max(1, record.weight)))
                continue
            try:
                addresses, its_ttl_s = await self._addresses(target)
            except NoAnswer as error:  # the others serve meanwhile
                trouble = error
                continue
            ttl_s = min((one for one in (ttl_s, its_ttl_s) if one is not None), default=None)
            hosts += [(base, address, max(1, record.weight)) for address in addresses]
        if trouble is not None and not hosts:
            raise trouble
        least = min(weight for _, _, weight in hosts)
        return tuple(Host(base, address, round(weight / least)) for base, address, weight in sorted(hosts)), ttl_s

    async def _addresses(self, name: str) -> tuple[list[str], float | None]:
        """A and AAAA from the configured server; an address stands for itself."""
        try:
            return [str(ipaddress.ip_address(name))], None
        except ValueError:
            pass
        answers = await asyncio.gather(self._ask(name, "A"), self._ask(name, "AAAA"))
        records = [record for answer in answers if answer is not None for record in answer]
        if not records:
            raise NoAnswer(f"{name} has no address")
        ttls = [float(answer.rrset.ttl) for answer in answers if answer is not None and answer.rrset is not None]
        return sorted({str(record.address) for record in records}), min(ttls, default=None)

    async def _ask(self, name: str, kind: str) -> Answer | Any | None:
        """The records of one kind; None if there are none. Raises NoAnswer."""
        from dns.asyncresolver import Resolver
        from dns.exception import DNSException
        from dns.resolver import NXDOMAIN

        try:
            if self._resolver is None:
                self._resolver = Resolver(configure=self._server is None)
                if self._server is not None:
                    self._resolver.nameservers = [self._server.host]
                    self._resolver.port = self._server.port
            return await self._resolver.resolve(
                name, kind, raise_on_no_answer=False, lifetime=TIMEOUT_S, search=self._server is None
            )
        except NXDOMAIN:
            raise NoAnswer(f"{name} does not exist") from None
        except (DNSException, OSError, ValueError) as error:
            raise NoAnswer(_words(error)) from error


async def _system_addresses(name: str) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NoAnswer(_words(error)) from error
    # An address with a scope ("fe80::1%eth0") is good on one machine's link alone.
    return sorted({str(address[0]) for *_, address in found if "%" not in str(address[0])})


def _words(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).partition(":")[0] or type(error).__name__
    return str(text).lower()[:200]
