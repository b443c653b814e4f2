"""REDIS_URL: every shape, and every mistake in words that repeat nothing of it."""

from __future__ import annotations

import pytest

from gateway.store.address import Address, parse

VERIFIED = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address("single", (("h", 6379),))),
        ("valkey://h:1/2", Address("single", (("h", 1),), db=2)),
        ("redis://:p%40ss@[::1]:7?db=3", Address("single", (("::1", 7),), db=3, password="p@ss")),
        ("redis://u:p@h", Address("single", (("h", 6379),), username="u", password="p")),
        ("unix:///run/s.sock?db=1", Address("unix", path="/run/s.sock", db=1)),
        ("unix://u:p@/run/s.sock", Address("unix", path="/run/s.sock", username="u", password="p")),
        ("redis+cluster://a,b:7001", Address("cluster", (("a", 6379), ("b", 7001)))),
        (
            "redis+sentinel://:p@a,b:1/main/4?sentinel_password=q",
            Address("sentinel", (("a", 26379), ("b", 1)), master="main", db=4, password="p", sentinel_password="q"),
        ),
        (
            "rediss://h",
            Address("single", (("h", 6379),), tls={"ssl_cert_reqs": "required", "ssl_check_hostname": True}),
        ),
        (
            "rediss+cluster://h?ssl_cert_reqs=none&ssl_ca_certs=/ca",
            Address(
                "cluster",
                (("h", 6379),),
                tls={"ssl_ca_certs": "/ca", "ssl_cert_reqs": "none", "ssl_check_hostname": False},
            ),
        ),
    ],
)
def test_what_a_url_means(url: str, address: Address) -> None:
    assert parse(url) == address
    assert "p@" not in str(address)
    assert "p@" not in repr(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h", "must begin"),
        ("redis://", "no valid host"),
        ("redis://h:0", "no valid host"),
        ("redis://h:99999", "no valid host"),
        ("redis://a,b", "several hosts"),
        ("redis://h/x", "no number"),
        ("redis://canary@h", "without a password"),
        ("redis://h?max_connections=1", "unknown option"),
        ("redis://h?ssl_cert_reqs=none", "unknown option"),  # without TLS it would do nothing
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("unix://relative", "absolute path"),
        ("redis+sentinel://h", "no master"),
        ("redis+cluster://h/1", "only one"),
    ],
)
def test_mistakes(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as wrong:
        parse(url)
    assert "canary" not in str(wrong.value)


def test_an_address_is_shown_without_its_password() -> None:
    assert str(parse("redis+sentinel://u:canary@a,b:1/main/4")) == "redis+sentinel://a:26379,b:1/main/4"
    assert str(parse("rediss://:canary@[::1]:7/2")) == "rediss://[::1]:7/2"
