"""Upstream and Lease: addresses as configured, and load counted exactly once."""

from __future__ import annotations

import random

import pytest

from gateway.runtimes import RUNTIMES
from gateway.upstreams.upstream import Health, Upstream


def make(url: str) -> Upstream:
    return Upstream("name", "provider", RUNTIMES["vllm"], url)


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "netloc", "prefix", "root"),
    [
        ("http://gpu1:8000/v1", "http", "gpu1", 8000, "gpu1:8000", "/v1", ""),
        ("http://gpu1:8000/v1/", "http", "gpu1", 8000, "gpu1:8000", "/v1", ""),
        ("http://gpu1", "http", "gpu1", 80, "gpu1", "", ""),
        ("https://gpu1/v1", "https", "gpu1", 443, "gpu1", "/v1", ""),
        ("https://gpu1:8443/pool/a/v1", "https", "gpu1", 8443, "gpu1:8443", "/pool/a/v1", "/pool/a"),
        ("http://[::1]:8080/v1", "http", "::1", 8080, "[::1]:8080", "/v1", ""),
        ("http://user:secret@gpu1:8000/v1", "http", "gpu1", 8000, "gpu1:8000", "/v1", ""),
        ("http://GPU1:8000/openai", "http", "gpu1", 8000, "GPU1:8000", "/openai", "/openai"),
    ],
)
def test_where_it_is(url: str, scheme: str, host: str, port: int, netloc: str, prefix: str, root: str) -> None:
    one = make(url)
    assert (one.scheme, one.host, one.port, one.netloc, one.prefix, one.root) == (
        scheme,
        host,
        port,
        netloc,
        prefix,
        root,
    )
    assert one.url("/api/tags") == f"{scheme}://{netloc}{root}/api/tags"


@pytest.mark.parametrize("url", ["", "gpu1:8000", "ftp://gpu1", "http://", "http:///v1", "file:///etc/passwd"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        make(url)


def test_a_lease_counts_from_its_making_and_is_dropped_once() -> None:
    one = make("http://gpu1/v1")
    lease = one.lease()
    assert (one.in_flight, one.served) == (1, 1)
    lease.release()
    lease.release()
    assert (one.in_flight, one.served) == (0, 1)


def test_a_lease_is_dropped_however_its_block_is_left() -> None:
    one = make("http://gpu1/v1")
    with one.lease():
        assert one.in_flight == 1
    with pytest.raises(KeyboardInterrupt), one.lease():
        raise KeyboardInterrupt
    with one.lease() as lease:
        lease.release()
    assert (one.in_flight, one.served) == (0, 3)


def test_leases_in_any_order_add_up() -> None:
    dice = random.Random(20)
    one = make("http://gpu1/v1")
    held = []
    for _ in range(1000):
        if held and dice.random() < 0.5:
            held.pop(dice.randrange(len(held))).release()
        else:
            held.append(one.lease())
        assert one.in_flight == len(held)


def test_before_the_first_probe_nothing_is_known() -> None:
    one = make("http://gpu1/v1")
    assert one.health == Health("unknown", "not probed yet", None, 0.0)
    assert one.models == ()


def test_its_repr_tells_what_an_operator_asks_and_no_secret() -> None:
    one = Upstream("gpu1", "provider", RUNTIMES["vllm"], "http://gpu1:8000/v1", api_key="sk-secret")
    assert repr(one) == "<Upstream gpu1 vllm http://gpu1:8000/v1 unknown in_flight=0>"
