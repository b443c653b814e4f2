"""plan: what is to be sent, and whom it may be sent to. Made by `resolve`, carried out by `dispatcher`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.catalog import Offer, Table, Tiers
from gateway.exchange import Exchange
from gateway.runtimes.runtime import OPENAI_PATHS
from gateway.wire.body import Body

if TYPE_CHECKING:
    from gateway.identity.principals import Principal


class Plan:
    """What to send, and to whom it may go: `tiers` are the model's pool and then those it falls back on, each one
    with what this caller may use and this request can use. There is one at least, and none is empty.
    """

    __slots__ = (
        "billable",
        "body",
        "cache_salt",
        "headers",
        "native",
        "operation",
        "provider",
        "remove",
        "replace",
        "session",
        "strip_usage",
        "tiers",
        "tools",
    )

    def __init__(self, body: Body, tiers: Tiers, operation: str, native: str) -> None:
        self.body = body
        self.tiers = tiers
        self.operation = operation
        self.native = native
        self.billable = True
        self.headers: list[tuple[bytes, bytes]] = []
        self.replace: dict[str, bytes] = {}
        self.remove: tuple[str, ...] = ()
        self.cache_salt = ""  # of the tenant, for runtimes that know such a thing
        self.session = ""  # as a header named it
        self.provider: str | None = None  # that the client asked for
        self.tools = False  # only models that support them
        self.strip_usage = False  # set by dispatch: we asked for a usage chunk that the client did not

    @property
    def offers(self) -> tuple[Offer, ...]:
        """The first tier."""
        return self.tiers[0]


def renew(exchange: Exchange, plan: Plan, table: Table) -> bool:
    """Choose the offers anew, for a request that has outlived those it was given: hosts come and go while it waits.
    False if there are no others, and the plan is what it was.
    """
    pools = table.pools if plan.provider is None else table.by_provider.get(plan.provider)
    tiers = () if pools is None else allowed(pools.tiers.get(exchange.model_asked, ()), exchange.principal)
    if plan.tools:
        tiers = kept(tiers, lambda offer: offer.model.supports_tools)
    if plan.operation not in OPENAI_PATHS:
        tiers = kept(tiers, lambda offer: plan.operation in offer.upstream.runtime.paths)
    if not tiers or tiers == plan.tiers:
        return False
    plan.tiers = tiers
    return True


def allowed(tiers: Tiers, principal: Principal | None) -> Tiers:
    """Those of which this caller may use something."""
    if principal is not None and principal.models is not None:
        return kept(tiers, lambda offer: principal.may_use(offer.model.name))
    return tiers if not tiers or tiers[0] else tiers[1:]


def kept(tiers: Tiers, keep: Callable[[Offer], bool]) -> Tiers:
    """What is left of each tier, without those of which nothing is."""
    left = (tuple(offer for offer in tier if keep(offer)) for tier in tiers)
    return tuple(tier for tier in left if tier)
