"""The Limiter without a gateway around it: alone, and on real stores."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import QuotaExceeded, RateLimited, render
from gateway.identity.principals import Principal
from gateway.limits import redis
from gateway.limits.limiter import Limiter
from gateway.limits.spec import Budget, Limit, period_of
from gateway.limits.texts import reset_text
from gateway.store.address import parse
from gateway.store.client import Store, StoreAway
from gateway.wire.usage import Usage
from tests.limits.requests import ALICE, begin, end, exchange, passes, requests, slots, tokens
from tests.store_fixtures import Server

ROOT = Path(__file__).parents[2]
BOB = Principal("bob", "bob")


@asynccontextmanager
async def gateways(count: int, server: Server, *limits: Limit, part: float = 1.0) -> AsyncIterator[list[Limiter]]:
    """Limiters with a connection each, as processes have."""
    stores = [Store(parse(server.url)) for _ in range(count)]
    for store in stores:
        await store.start()
    limiters = [Limiter(limits, store, part=part) for store in stores]
    try:
        yield limiters
    finally:
        for limiter, store in zip(limiters, stores, strict=True):
            await limiter.stop()
            await store.close()


async def until(true: Callable[[], bool] | Callable[[], Awaitable[bool]], within_s: float = 3.0) -> float:
    began_at = time.monotonic()
    while True:
        found = true()
        if found if isinstance(found, bool) else await found:
            return time.monotonic() - began_at
        assert time.monotonic() - began_at < within_s
        await asyncio.sleep(0.01)


# --- alone


async def test_without_limits_nothing_is_looked_at() -> None:
    limiter = Limiter((), None)
    assert limiter.entry(exchange(), "m") is None


async def test_the_scopes() -> None:
    """Which buckets are shared, and which are apart."""
    group = Principal("a", "a", group="g"), Principal("b", "b", group="g"), Principal("c", "c", group="h")
    for scope, shared in (("key", False), ("group", True), ("global", True)):
        limiter = Limiter((requests(1, scope=scope),), None)
        assert await passes(limiter, group[0])
        assert not await passes(limiter, group[0])
        assert await passes(limiter, group[1]) is not shared
        assert await passes(limiter, group[2]) is (scope != "global")
    limiter = Limiter((requests(1, scope="key_model"),), None)
    await begin(limiter, model="one")
    await begin(limiter, model="two")
    with pytest.raises(RateLimited):
        await begin(limiter, model="one")
    limiter = Limiter((requests(1, scope="key_endpoint"),), None)
    for route in ("/v1/chat/completions", "/v1/embeddings"):
        entry = limiter.entry(exchange(route=route), "m")
        assert entry is not None
        limiter.admit(exchange(route=route), entry)
    with pytest.raises(RateLimited):
        await begin(limiter)


async def test_a_group_limit_is_nothing_to_a_key_without_group() -> None:
    assert Limiter((requests(1, scope="group"),), None).entry(exchange(), "m") is None


async def test_a_keys_own_limit_replaces_the_general_one_of_its_name() -> None:
    limiter = Limiter((requests(1),), None)
    rich = Principal("rich", "rich", limits=(requests(3),))
    assert [await passes(limiter, rich) for _ in range(4)] == [True, True, True, False]
    assert [await passes(limiter) for _ in range(2)] == [True, False]
    richer = Principal("rich", "rich", limits=(requests(5),))  # edited: what was used is used
    assert not await passes(limiter, richer)


async def test_what_a_refusal_says() -> None:
    limiter = Limiter((requests(2, 0.5), tokens(1000, 100.0)), None)
    for _ in range(2):
        await begin(limiter, prompt=100)
    refused = exchange()
    entry = limiter.entry(refused, "m")
    assert entry is not None
    with pytest.raises(RateLimited) as caught:
        limiter.admit(refused, entry, 100)
    error = caught.value
    assert error.status == 429
    assert error.code == "rate_limit_exceeded"
    assert error.type == "requests"
    assert "limit 'r' (scope key) reached: 2/2 requests used; it will pass in 2 s" in error.message
    assert error.retry_after_s == 2
    (name, value), *_ = error.headers
    assert name == "retry-after-ms"
    assert 1900 <= int(value) <= 2000
    told = dict(line.split(": ") for line in refused.headers.decode().split("\r\n")[:-1])
    assert told["x-ratelimit-limit-requests"] == "2"
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert told["x-ratelimit-reset-requests"] == "4s"
    assert told["x-ratelimit-limit-tokens"] == "1000"
    assert 800 <= int(told["x-ratelimit-remaining-tokens"]) <= 802
    assert told["x-ratelimit-reset-tokens"] == "2s"
    assert limiter.refused == {("r", "key"): 1}
    assert json.loads(render(error, "ollama")) == {"error": error.message}
    assert json.loads(render(error, "anthropic"))["error"] == {"type": "rate_limit_error", "message": error.message}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (1, "1s"), (60, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (86461, "24h1m1s")]
)
def test_reset_text(seconds: int, text: str) -> None:
    assert reset_text(seconds) == text


async def test_observed_limits_refuse_nothing_and_count() -> None:
    limiter = Limiter((requests(1, observe=True), slots(5)), None)
    for _ in range(3):
        await begin(limiter)
    assert limiter.observed == {"r": 2}
    assert limiter.refused == {}


def unix(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("period", "at", "name", "end"),
    [
        ("day", "2026-12-31T23:59:59", "2026-12-31", "2027-01-01T00:00:00"),
        ("week", "2027-01-03T12:00:00", "2026-12-28", "2027-01-04T00:00:00"),
        ("month", "2028-02-29T12:00:00", "2028-02-01", "2028-03-01T00:00:00"),
        ("month", "2026-12-31T12:00:00", "2026-12-01", "2027-01-01T00:00:00"),
    ],
)
def test_periods_are_of_the_calendar(period: str, at: str, name: str, end: str) -> None:
    assert period_of(period, unix(at)) == (name, unix(end))  # type: ignore[arg-type]


async def test_a_budget_begins_anew_with_its_period() -> None:
    limiter = Limiter((), None)
    who = Principal("a", "a", budget=Budget(100, "tokens", "day"))
    monday, tuesday = unix("2026-11-23T23:59:00"), unix("2026-11-24T00:00:00")
    end(limiter, await begin(limiter, who, 60, 60, began_unix_s=monday), Usage(60, 60))
    with pytest.raises(QuotaExceeded) as caught:
        await begin(limiter, who, 1, 1, began_unix_s=monday)
    assert caught.value.status == 402
    assert caught.value.code == "insufficient_quota"
    assert ("x-should-retry", "false") in caught.value.headers
    assert "120/100 tokens for the day; it renews at 2026-11-24T00:00Z" in caught.value.message
    await begin(limiter, who, 1, 1, began_unix_s=tuesday)


# --- on a store


async def test_three_gateways_admit_exactly_the_limit(store_server: Server) -> None:
    for burst in (50, 1000):
        async with gateways(3, store_server, requests(burst, name=f"r{burst}")) as limiters:
            admitted = [0, 0, 0]

            async def ask(number: int, limiter: Limiter, times: int = burst, admitted: list[int] = admitted) -> None:
                for _ in range(times):
                    admitted[number] += await passes(limiter)
                    await asyncio.sleep(0)

            await asyncio.gather(*(ask(number, limiter) for number, limiter in enumerate(limiters)))
            await asyncio.sleep(redis.IDLE_S + 0.3)  # what one did not use is given back, to whoever still asks
            for number in range(3):
                while await passes(limiters[number]):
                    admitted[number] += 1
            assert sum(admitted) == burst
            assert min(admitted) > 0


async def test_a_hundred_at_once_reserve_no_more_than_there_is(store_server: Server) -> None:
    async with gateways(2, store_server, tokens(10_000)) as limiters:
        asked = [begin(limiters[number % 2], prompt=100, completion=200) for number in range(100)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        admitted = [one for one in found if not isinstance(one, BaseException)]
        assert len(admitted) == 33
        assert sum(isinstance(one, RateLimited) for one in found) == 67
        for number, one in enumerate(admitted):  # all used half: what is left over is given back
            end(limiters[number % 2], one, Usage(50, 100))
        await asyncio.sleep(redis.TICK_S * 2 + redis.IDLE_S)
        found = await asyncio.gather(*(begin(limiters[0], prompt=300) for _ in range(100)), return_exceptions=True)
        assert sum(not isinstance(one, BaseException) for one in found) == (10_000 - 33 * 150) // 300


async def test_a_refused_request_takes_nothing_of_any_limit(store: Store) -> None:
    limiter = Limiter((requests(100), tokens(1000), slots(10)), store)
    held = [await begin(limiter, prompt=1000)]
    await asyncio.sleep(0.15)
    keys = [store.key("limit", *rest, "key", "alice") for rest in (("r", "requests"), ("t", "total_tokens"))]
    before = [await store.call("HGETALL", key) for key in keys]
    for _ in range(5):
        with pytest.raises(RateLimited):
            await begin(limiter, prompt=500)
        await asyncio.sleep(0.03)
    after = [await store.call("HGETALL", key) for key in keys]
    left = [_left(one) for one in (*before, *after)]
    assert left[:2] == left[2:]
    for one in held:
        end(limiter, one)
    await limiter.stop()
    assert [_left(await store.call("HGETALL", key)) for key in keys] == [99_000_000, 1_000_000_000]


def _left(found: dict[bytes, bytes]) -> int:
    """A bucket's level and what is on loan, to the millionth: these refill by one in a second."""
    loans = sum(int(value.split()[0]) for name, value in found.items() if len(name) > 1)
    return (int(found[b"l"]) + loans) // 1000 * 1000


async def test_most_requests_are_decided_here(store: Store) -> None:
    limiter = Limiter((requests(100_000, 10_000.0), tokens(10**8, 10**7), slots(1000)), store)
    waited = 0
    for _ in range(2000):
        one = exchange()
        entry = limiter.entry(one, "m")
        assert entry is not None
        waiting = limiter.admit(one, entry, 100, 1024)
        if waiting is not None:
            waited += 1
            await waiting
        end(limiter, one, Usage(90, 300))
        await asyncio.sleep(0)
    assert limiter.calls <= 200
    assert waited <= 200
    await limiter.stop()


async def test_slots_are_free_again_for_all_at_once(store_server: Server) -> None:
    async with gateways(2, store_server, slots(2)) as (one, two):
        first, second = await begin(one), await begin(two)
        with pytest.raises(RateLimited, match="2/2 concurrent requests run"):
            await begin(two)
        end(one, first)
        await until(lambda: passes(two))
        end(two, second)


async def test_a_client_that_leaves_while_the_store_decides_takes_nothing(store: Store) -> None:
    limiter = Limiter((requests(3), slots(3)), store)
    for _ in range(20):
        one = exchange()
        entry = limiter.entry(one, "m")
        assert entry is not None
        task = asyncio.ensure_future(limiter.admit(one, entry))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        limiter.settle(one)
        await asyncio.sleep(0.003)
    held = [await begin(limiter) for _ in range(3)]
    for one in held:
        end(limiter, one)
    await limiter.stop()


async def test_a_budget_on_a_store_is_passed_by_one_request_at_most(store_server: Server) -> None:
    who = Principal("a", "a", budget=Budget(1.0, "currency", "month"))
    async with gateways(3, store_server) as limiters:
        spent = 0.0

        async def ask(limiter: Limiter) -> None:
            nonlocal spent
            for _ in range(40):
                try:
                    one = await begin(limiter, who, cost=0.03)
                except QuotaExceeded:
                    return
                await asyncio.sleep(0.001)
                end(limiter, one, Usage(1, 1), 0.02)
                spent += 0.02

        await asyncio.gather(*(ask(limiter) for limiter in limiters for _ in range(4)))
        await asyncio.sleep(redis.IDLE_S + 0.3)
        await asyncio.gather(*(ask(limiter) for limiter in limiters))
        assert 0.98 <= spent <= 1.03


@pytest.mark.parametrize("ran", [True, False])
async def test_a_call_that_was_lost_costs_a_budget_nothing(
    store: Store, ran: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = Principal("b", "b", budget=Budget(1000.0, "currency", "total"))
    limiter = Limiter((), store)
    end(limiter, await begin(limiter, who, cost=1.0), Usage(1, 1), 1.0)
    run = store.run
    losing = [True]

    async def lossy(*args: Any, **options: Any) -> Any:
        if losing.pop() if losing else False:
            if ran:
                await run(*args, **options)
            raise StoreAway("timeout")
        return await run(*args, **options)

    monkeypatch.setattr(store, "run", lossy)
    for cost in (50.0, 3.0, 1.0):
        end(limiter, await begin(limiter, who, cost=cost), Usage(1, 1), 2.0)
    await limiter.stop()
    assert not losing
    level = await store.call("HGET", store.key("budget", "b", "currency", "total", "total"), "l")
    assert int(level) == (1000 - 1 - 3 * 2) * 100_000_000


async def test_a_giant_estimate_does_not_renew_a_budget(store_server: Server) -> None:
    """While it is reserved, others are charged: the bound of a budget's debt must not lift what is left of it."""
    who = Principal("b", "b", budget=Budget(1000.0, "currency", "total"))
    async with gateways(1, store_server) as (limiter,):
        end(limiter, await begin(limiter, who, cost=1.0), Usage(1, 1), 900.0)  # 100 are left
        small = await begin(limiter, who, cost=1.0)
        giant = await begin(limiter, who, cost=1e12)
        end(limiter, small, Usage(1, 1), 50.0)
        await asyncio.sleep(2 * redis.TICK_S)
        end(limiter, giant, Usage(1, 1), 1.0)
        await asyncio.sleep(2 * redis.TICK_S)
        last = await begin(limiter, who, cost=1.0)
        end(limiter, last, Usage(1, 1), 49.0)
        await asyncio.sleep(2 * redis.TICK_S)
        with pytest.raises(QuotaExceeded):
            await begin(limiter, who, cost=1.0)


async def test_what_is_owed_of_a_bucket_that_was_forgotten_here_is_charged(store: Store) -> None:
    limiter = Limiter((tokens(1000),), store)

    async def told() -> None:
        assert limiter._shared is not None
        await until(lambda: all(bucket.idle() for bucket in limiter._buckets.values()))

    for _ in range(3):
        one = await begin(limiter, prompt=10)
        end(limiter, one, Usage(110, 0))
        await told()
        limiter._forget()
        assert not limiter._buckets
    level = await store.call("HGET", store.key("limit", "t", "total_tokens", "key", "alice"), "l")
    assert int(level) // 1_000_000 == 1000 - 3 * 110
    await limiter.stop()


async def test_nothing_owed_is_lost_at_the_end(store: Store) -> None:
    limiter = Limiter((tokens(10_000),), store)
    one = await begin(limiter, prompt=100)
    end(limiter, one, Usage(100, 900))
    await limiter.stop()
    found = await store.call("HGETALL", store.key("limit", "t", "total_tokens", "key", "alice"))
    assert int(found[b"l"]) // 10**6 == 9_000


HOLDER = """
import asyncio, sys
from gateway.limits import redis
from gateway.limits.limiter import Limiter
from gateway.store.address import parse
from gateway.store.client import Store, StoreAway
from tests.limits.requests import begin, slots

async def main():
    redis.LOAN_S, redis.USE_S, redis.RENEW_S = 0.8, 0.6, 0.2
    store = Store(parse(sys.argv[1]))
    await store.start()
    limiter = Limiter((slots(1),), store)
    await begin(limiter)
    print("held", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_slots_are_held_while_their_process_lives_and_no_longer(valkey_server: Server) -> None:
    async with gateways(1, valkey_server, slots(1)) as (limiter,):
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, valkey_server.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as holder:
            try:
                assert holder.stdout is not None
                assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
                await asyncio.sleep(1.2)  # longer than it is held unless renewed
                assert not await passes(limiter)
            finally:
                holder.kill()
        await until(lambda: passes(limiter), 1.2)


# --- away


async def _slept(seconds: float) -> float:
    began_at = time.monotonic()
    await asyncio.sleep(seconds)
    return time.monotonic() - began_at


async def test_while_the_store_is_paused_requests_wait_little_and_then_not_at_all(store_server: Server) -> None:
    async with gateways(1, store_server, requests(40), tokens(10**6), part=0.5) as (limiter,):
        assert await passes(limiter, prompt=10)
        store_server.pause()
        waits = []
        for _ in range(15):
            began_at = time.monotonic()
            # Beside it a plain sleep of 50 ms: on a busy machine it says by how much every timer is late.
            timer = asyncio.ensure_future(_slept(0.05))
            await passes(limiter, prompt=10)
            waits.append(time.monotonic() - began_at)
            waits[-1] -= 2 * max(0.0, await timer - 0.05)
        assert sorted(waits)[7] <= 0.05  # and not each: what holds up one may pass by the timer beside it
        assert max(waits) <= 0.5
        assert max(waits) >= 0.03, "it was waited for at all"
        await until(lambda: limiter.degraded, 2.0)
        waits = []
        for number in range(100):
            who = Principal(str(number), str(number))
            began_at = time.thread_time()  # nothing is awaited, so this is all, but for what other processes take
            assert await passes(limiter, who, 10)
            waits.append(time.thread_time() - began_at)
        assert sorted(waits)[98] <= 0.001
        new = Principal("new", "new")
        assert sum([await passes(limiter, new) for _ in range(40)]) == 20  # its share, and no more
        store_server.resume()
        assert await until(lambda: not limiter.degraded) < 2.0
        calls = limiter.calls
        assert await passes(limiter, BOB)
        assert limiter.calls > calls


async def test_what_was_granted_alone_is_missing_in_the_store_afterwards(store_server: Server) -> None:
    async with gateways(1, store_server, requests(40)) as (limiter,):
        assert await passes(limiter)
        store_server.pause()
        await until(lambda: limiter.degraded, 3.0)
        for _ in range(30):
            assert await passes(limiter)
        store_server.resume()
        await until(lambda: not limiter.degraded)
        assert sum([await passes(limiter) for _ in range(40)]) == 9


def told(limiter: Limiter) -> bool:
    """The store is there, and knows everything."""
    buckets = limiter._buckets.values()
    return not limiter.degraded and not any(one.owed or one.sent or one.share is not None for one in buckets)


async def test_what_several_granted_alone_adds_up_in_the_store_afterwards(store_server: Server) -> None:
    """Each knew of its own share only; together they granted the limit, and after the outage nothing is left of it."""
    async with gateways(3, store_server, requests(90), part=1 / 3) as three:
        for limiter in three:
            assert await passes(limiter)
        store_server.kill()
        await until(lambda: all(limiter.degraded for limiter in three), 3.0)
        granted = [sum([await passes(limiter) for _ in range(90)]) for limiter in three]
        assert 60 <= sum(granted) <= 87
        store_server.start()
        await until(lambda: all(told(limiter) for limiter in three), 10.0)
        after = [sum([await passes(limiter) for _ in range(90)]) for limiter in three]
        assert (
            90 - 3 * 6 <= 3 + sum(granted) + sum(after) <= 90
        )  # what each had on loan, five or six, went with the store


async def test_a_budget_counts_what_each_spent_alone(store_server: Server) -> None:
    poor = Principal("poor", "poor", budget=Budget(10_000, "tokens", "total"))
    async with gateways(3, store_server, part=1 / 3) as three:
        for limiter in three:
            assert await passes(limiter, poor, 1)
        for _ in range(2):
            store_server.pause()
            await until(lambda: all(limiter.degraded for limiter in three), 3.0)
            for limiter in three:
                for _ in range(10):
                    assert await passes(limiter, poor, 100)
            store_server.resume()
            await until(lambda: all(told(limiter) for limiter in three), 10.0)
        for limiter in three:
            await limiter.stop()  # what is on loan goes back
        (bucket,) = three[0]._buckets.values()
        assert three[0]._store is not None
        level = int(await three[0]._store.call("HGET", bucket.key, "l"))
        left = 10_000 - 3 - 2 * 3 * 10 * 100
        # What was on loan comes back, but for what each took for spent by the others: a part of their loans of 32.
        assert left - 2 * 32 <= level <= left


async def test_a_store_that_is_gone_from_the_start(store_server: Server) -> None:
    store_server.kill()
    async with gateways(1, store_server, requests(2), slots(1)) as (limiter,):
        assert limiter.degraded
        assert [await passes(limiter, ALICE) for _ in range(3)] == [True, True, False]
        store_server.start()
        await until(lambda: not limiter.degraded)
