"""How often an address may be wrong: the bucket, its bounds, and what it does to requests over real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.identity.failures import Failures, address_of
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, chat, gateway, provider


def wrong(failures: Failures, remote: str, now: float, count: int) -> None:
    for _ in range(count):
        failures.wrong(remote, now)


def wait_s(failures: Failures, remote: str, now: float) -> float | None:
    failing = failures.find(remote, now)
    return None if failing is None else failures.wait_s(failing)


def test_burst_and_refill() -> None:
    failures = Failures(10)
    assert wait_s(failures, "1.2.3.4", 0.0) is None
    wrong(failures, "1.2.3.4", 0.0, 19)
    assert wait_s(failures, "1.2.3.4", 0.0) == 0.0
    wrong(failures, "1.2.3.4", 0.0, 1)
    assert wait_s(failures, "1.2.3.4", 0.0) == pytest.approx(6.0)
    assert wait_s(failures, "1.2.3.4", 4.0) == pytest.approx(2.0)
    assert wait_s(failures, "1.2.3.4", 6.01) == 0.0
    wrong(failures, "1.2.3.4", 6.01, 1)
    assert wait_s(failures, "1.2.3.4", 6.01) == pytest.approx(6.0, abs=0.1)
    assert wait_s(failures, "1.2.3.5", 6.01) is None
    assert len(failures.addresses) == 1
    assert wait_s(failures, "1.2.3.4", 200.0) is None  # full again: forgotten
    assert not failures.addresses


def test_in_any_window_no_more_than_burst_and_refill_are_looked_at() -> None:
    failures = Failures(10)
    looked_at = []
    for step in range(6000):  # ten a second, ten minutes
        now = step / 10
        if not wait_s(failures, "1.2.3.4", now):
            looked_at.append(now)
            failures.wrong("1.2.3.4", now)
    for start in range(0, 600, 7):
        for length in (1, 30, 60, 300):
            assert sum(start <= one < start + length for one in looked_at) <= 20 + 10 * length / 60 + 1


def test_addresses_are_bounded_and_the_oldest_gives_way() -> None:
    failures = Failures(1, addresses_max=3)
    for address in ("a", "b", "c", "a", "d"):
        wrong(failures, address, 0.0, 2)
    assert list(failures.addresses) == ["c", "a", "d"]
    assert wait_s(failures, "a", 0.0) == pytest.approx(180.0)


def test_keys_that_are_remembered_are_bounded() -> None:
    failures = Failures(1)
    failures.wrong("a", 0.0)
    failing = failures.find("a", 0.0)
    assert failing is not None
    for number in range(1000):
        failures.right(failing, str(number))
    assert len(failing.seen) == 100


def test_off() -> None:
    failures = Failures(0)
    wrong(failures, "1.2.3.4", 0.0, 1000)
    assert not failures.addresses
    assert failures.counts["unknown"] == 1000


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("1.2.3.4", "1.2.3.4"),
        (None, ""),
        ("", ""),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_what_one_address_is(remote: str | None, address: str) -> None:
    assert address_of(remote) == address


async def test_wrong_keys_are_refused_unseen_and_right_ones_in_use_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), limited={"late": frozenset({"sim"})}) as here:
        ring = here.app.keys.ring
        proofs: list[bytes] = []
        prove = type(ring)._prove
        monkeypatch.setattr(type(ring), "_prove", lambda self, raw: proofs.append(raw) or prove(self, raw))
        assert (await here.ask("GET", "/v1/models", key="wrong-0")).status == 401
        assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200  # used rightly while it may fail
        for number in range(1, 20):
            assert (await here.ask("GET", "/v1/models", key=f"wrong-{number}")).status == 401
        done = len(proofs)
        for number in range(30):
            answer = await here.ask("POST", CHAT, chat(), key=f"guess-{number}")
            assert (answer.status, answer.error["code"]) == (429, "too_many_wrong_keys")
            assert 1 <= int(answer.header("Retry-After") or 0) <= 6
        assert (await here.ask("GET", "/v1/models", key=here.keys["late"])).status == 429  # right, and never used here
        assert len(proofs) == done  # nothing was looked at
        assert (await here.ask("POST", CHAT, chat(max_tokens=1))).status == 200
        assert (await here.ask("GET", "/v1/models", key=None)).status == 401
        assert (await here.ask("GET", "/livez", key=None)).status == 200
        text = await here.scrape()
        for reason, count in (("unknown", 20), ("limited", 31), ("missing", 1)):
            assert f'gateway_auth_failures_total{{reason="{reason}"}} {count}.0' in text
        assert "guess" not in text + here.log_text()


async def test_no_limit_with_zero(tmp_path: Path) -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url), auth_failures_per_min=0) as here:
        for number in range(50):
            assert (await here.ask("GET", "/v1/models", key=f"wrong-{number}")).status == 401
        assert (await here.ask("GET", "/v1/models")).status == 200
