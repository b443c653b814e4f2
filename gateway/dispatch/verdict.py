"""verdict: what an upstream's reply says of the upstream, and what the client is told when all attempts failed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from time import monotonic

from gateway.catalog import Offer
from gateway.errors import GatewayError, NoCapacity, UpstreamBroken, UpstreamError, UpstreamTimeout
from gateway.exchange import Attempt
from gateway.routing.eligible import quiet_for_s
from gateway.routing.retries import retry_after_s
from gateway.upstreams.reply import Reply
from gateway.wire.opening import fault


def fault_of(reply: Reply, offer: Offer) -> UpstreamError | None:
    """What a reply says about its upstream rather than about the request: another may do better. None for an answer.

    Where it asks to be left alone, the offer is.
    """
    if reply.status >= 300:
        return _by_status(reply, offer)
    if reply.streaming and reply.status == 200:
        return _by_opening(reply, offer)
    return None


def _by_status(reply: Reply, offer: Offer) -> UpstreamError | None:
    status = reply.status
    provider = offer.upstream.provider
    if status >= 500 or status == 429:
        if status in (501, 505):
            return None
        wait_s = retry_after_s(reply.head.header(b"retry-after"), time.time()) if status in (429, 503) else None
        if wait_s:
            offer.quiet_until = monotonic() + wait_s
        code = "busy" if status == 429 or wait_s is not None else "unavailable" if status == 503 else "failed"
        return UpstreamError(f"provider {provider!r} answered {status}", code=f"upstream_{code}", retry_after_s=wait_s)
    if status in (401, 403):
        # The upstream's word about our credential, which the client would take for one about its own.
        return UpstreamError(
            f"provider {provider!r} refused the gateway's credential ({status}): check its `apiKey`",
            code="upstream_auth_failed",
        )
    if status < 400:  # followed blindly, it would take prompts to another host
        return UpstreamError(
            f"provider {provider!r} redirects ({status}): set its `baseUrl` to the final address",
            code="upstream_redirect",
        )
    return None


def _by_opening(reply: Reply, offer: Offer) -> UpstreamError | None:
    """A stream that ended, or reported an error, before it had any content."""
    said = reply.opening
    provider = offer.upstream.provider
    if said is None:
        if reply.complete:
            return UpstreamBroken(
                f"provider {provider!r} ended its stream before the answer was finished", code="upstream_incomplete"
            )
    elif (text := fault(said)) is not None:
        return UpstreamError(
            f"provider {provider!r} failed before it began to answer: {text}", code="upstream_stream_error"
        )
    return None


def exhausted(error: UpstreamError, made: Sequence[Attempt], tiers: Sequence[Sequence[Offer]]) -> GatewayError:
    """What the client is told when all attempts failed: the only one's own error, or one that lists them all."""
    if len(made) < 2:
        return error
    tried = "; ".join(f"{one.upstream}: {one.outcome.replace('_', ' ')} after {one.seconds:.1f} s" for one in made)
    message = f"{error.message} (attempts: {tried})"
    outcomes = {one.outcome for one in made}
    if outcomes & {"busy", "unavailable"}:
        wait_s = max(1.0, error.retry_after_s or quiet_for_s(tiers, monotonic()))
        return NoCapacity(message, retry_after_s=wait_s)
    if all(outcome.endswith("timeout") for outcome in outcomes):
        return UpstreamTimeout(message, code=error.code)
    return UpstreamError(message, status=error.status, code=error.code)


def nobody(tiers: Sequence[Sequence[Offer]]) -> NoCapacity:
    """Why nobody can be asked at all."""
    wait_s = quiet_for_s(tiers, monotonic())
    if wait_s:
        return NoCapacity("every upstream of this model asked to be left alone for now", retry_after_s=wait_s)
    return NoCapacity("every upstream of this model is being taken out of service", retry_after_s=5.0)
