"""The splitters: every byte comes out, events end where the standard says, whatever the reads were."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.wire.ndjson import NdjsonSplitter
from gateway.wire.sse import SseSplitter, parse_event


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in [*sizes, len(data)]:
        pieces.append(data[at : at + size])
        at += size
    return pieces


def plain_lines(data: bytes) -> list[bytes]:
    """Lines with their ends, by the standard's own words: CRLF, else LF, else CR."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+\Z", data)


def plain_events(data: bytes) -> list[bytes]:
    """Non-empty events, decoded line by line: the lines before each empty one."""
    events, lines = [], []
    for line in plain_lines(data):
        text = line.rstrip(b"\r\n")
        if text:
            lines.append(text)
        elif lines:
            events.append(b"\n".join(lines))
            lines = []
    return events


TEXT = st.lists(st.sampled_from([b"a", b"data: x", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r", b"\xc3\xa4"]), max_size=24)


@given(TEXT, st.lists(st.integers(0, 4), max_size=40))
@example([b"a", b"\r\n", b"\r", b"\n", b"b"], [1, 1, 1, 1, 1])
@example([b"a", b"\n", b"\r\n", b"b", b"\r\r"], [1, 1, 1])
@settings(max_examples=400, deadline=None)
def test_sse_events_do_not_depend_on_the_reads(parts: list[bytes], sizes: list[int]) -> None:
    data = b"".join(parts)
    splitter = SseSplitter()
    events = [event for piece in cut(data, sizes) for event in splitter.feed(piece)]
    rest = splitter.rest()
    assert b"".join(events) + rest == data
    found = [re.sub(rb"\r\n|\r", b"\n", event).strip(b"\n") for event in events]
    assert [event for event in found if event] == plain_events(data)
    assert splitter.rest() == b""


@given(TEXT, st.lists(st.integers(0, 4), max_size=40))
@settings(max_examples=200, deadline=None)
def test_ndjson_lines_do_not_depend_on_the_reads(parts: list[bytes], sizes: list[int]) -> None:
    data = b"".join(parts)
    splitter = NdjsonSplitter()
    lines = [line for piece in cut(data, sizes) for line in splitter.feed(piece)]
    rest = splitter.rest()
    assert b"".join(lines) + rest == data
    assert [*lines, rest] == [line + b"\n" for line in data.split(b"\n")[:-1]] + [data.split(b"\n")[-1]]


def test_an_event_is_given_with_its_last_byte() -> None:
    for end in (b"\n\n", b"\r\r", b"\r\n\r\n"):
        splitter = SseSplitter()
        *early, last = [splitter.feed(bytes([byte])) for byte in b"data: x" + end]
        first = next(event for events in [*early, last] for event in events)
        assert first in (b"data: x" + end, b"data: x\r\n\r")
        assert last


@pytest.mark.parametrize(
    ("event", "name", "data"),
    [
        (b"data: x\n\n", b"", b"x"),
        (b"data:x\n\n", b"", b"x"),
        (b"data:  x\n\n", b"", b" x"),
        (b"event: e\ndata: a\ndata: b\n\n", b"e", b"a\nb"),
        (b"event:e\r\ndata: a\r\ndata:b\r\n\r\n", b"e", b"a\nb"),
        (b"data: a\rdata: b\r\r", b"", b"a\nb"),
        (b": ping\n\n", b"", b""),
        (b": ping\ndata: a\nid: 1\nretry: 5\n\n", b"", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"", b"a"),
        (b"data\n\n", b"", b""),
        (b"data:", b"", b""),
        (b"data:\n\n", b"", b""),
        (b"data: ", b"", b""),
        (b"data: x", b"", b"x"),
        (b"data: x\n", b"", b"x"),
        (b"data: x\nd", b"", b"x"),
        (b"", b"", b""),
    ],
)
def test_parse_event(event: bytes, name: bytes, data: bytes) -> None:
    assert parse_event(event) == (name, data)
