"""The log: request lines that cost no one their stream, and traces without values."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from gateway.exchange import Exchange
from gateway.ledger.record import encode, record
from gateway.log import MAX_HELD_BYTES, RequestLog, trace


def one() -> Exchange:
    exchange = Exchange("req-1", "GET", "/livez", 1.0, 1_700_000_000.0)
    exchange.ended_at, exchange.status = 1.5, 200
    return exchange


async def test_lines_are_gathered_and_written_at_once() -> None:
    reader, writer = os.pipe()
    log = RequestLog(writer)
    for _ in range(3):
        log.post(encode(record(one())))
    await asyncio.sleep(0.1)
    lines = os.read(reader, 100_000).decode().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["req-1"] * 3
    assert log.lost() == 0
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_reader_that_does_not_read_costs_lines_and_no_time(blocking: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    log = RequestLog(writer)
    posted = 0
    while log.dropped == 0:
        for _ in range(100):
            log.post(encode(record(one())))
            posted += 1
        log.flush()
        assert posted < 50_000, "nothing is ever given up"
    # once it reads again it gets whole lines, in order
    os.set_blocking(reader, False)
    text = b""
    while log._lines or not text.endswith(b"\n"):
        try:
            text += os.read(reader, 1_000_000)
        except BlockingIOError:
            log.flush()
    lines = text.splitlines()
    assert len(lines) == posted - log.lost()
    assert all(json.loads(line)["status"] == 200 for line in lines)
    assert len(text) > MAX_HELD_BYTES
    os.close(reader)
    os.close(writer)
    if log._timer is not None:
        log._timer.cancel()


async def test_a_log_that_is_gone_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = RequestLog(writer)
    log.post(encode(record(one())))
    log.flush()
    assert log.lost() == 1
    log.post(encode(record(one())))
    log.flush()
    assert log.lost() == 2
    os.close(writer)


def fail(secret: str) -> None:
    try:
        {}[secret]
    except KeyError as error:
        raise ValueError(f"about {secret}") from error


def test_a_trace_names_places_and_types_and_no_values() -> None:
    try:
        fail("CANARY")
    except ValueError as error:
        text = trace(error)
    assert "CANARY" not in text.replace('fail("CANARY")', "")
    assert "ValueError" in text
    assert "caused by:" in text
    assert "KeyError" in text
    assert __file__ in text
    assert text.count("Traceback") == 2


def test_a_trace_of_an_endless_chain_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert trace(first).count("Traceback") == 8


def test_what_has_its_default_is_left_out() -> None:
    line = json.loads(encode(record(one())))
    assert {"request_id", "status", "error", "ttft_s"} <= line.keys(), "what every request has is always there"
    assert line.keys().isdisjoint({"cost", "queued_s", "attempts_made", "limits", "client", "model_asked"})
