"""The journal: each request in it once, whatever happened to the process, the file or the disk."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from gateway.ledger import frames
from gateway.ledger.journal import PROGRESS_S, Journal
from gateway.ledger.recovery import GATEWAY_ENDED, Damaged, adopt, entries, journals, recover
from tests.journeys.stage import until
from tests.ledger.books import died, exchange, finished, journal, streamed


async def test_every_request_once_its_own_record_or_one_made_from_its_marks(tmp_path: Path) -> None:
    one = Journal(tmp_path)
    one.start()
    ended, bare, stream = exchange(1), exchange(2), exchange(3, stream=True)
    for each in (ended, bare, stream):
        one.open(each)
    streamed(stream, 40)
    one.post(finished(ended))
    marked_at = one.position
    await until(lambda: one.position > marked_at, PROGRESS_S * 2.5, "a progress mark")
    streamed(stream, 7)  # relayed after the mark: nobody can know
    await died(one)

    found = {record.request_id: record for record in recover(one.folder)}
    assert found[ended.id].outcome == "ok"
    assert not found[ended.id].estimated
    assert (found[bare.id].outcome, found[bare.id].error) == ("partial", GATEWAY_ENDED)
    assert (found[bare.id].prompt_tokens, found[bare.id].completion_tokens) == (100, 0)  # 400 bytes of prompt
    partial = found[stream.id]
    assert (partial.outcome, partial.completion_tokens, partial.estimated) == ("partial", 40, True)
    assert partial.cost == pytest.approx((100 * 2.0 + 40 * 8.0) / 1e6)
    assert (partial.key, partial.group, partial.model) == ("client", "team", "sim")
    assert len(found) == 3


async def test_adoption_waits_for_the_end_of_the_process_and_happens_once(tmp_path: Path) -> None:
    one = Journal(tmp_path)
    one.start()
    one.open(exchange(1))
    one.open(exchange(2))
    one.post(finished(exchange(3)))
    assert list(adopt(tmp_path)) == [], "its process lives"
    await died(one)
    for recovered in (2, 0, 0):
        (adopted,) = adopt(tmp_path)
        assert list(adopt(tmp_path)) == [], "one adopts, nobody else"
        adopted.finish()
        assert adopted.recovered == recovered
        adopted.release()
        assert sorted(record.request_id for record in recover(one.folder)) == ["req-000001", "req-000002", "req-000003"]


async def test_a_journal_closed_in_order_needs_no_recovery(tmp_path: Path) -> None:
    async with journal(tmp_path) as one:
        mine = exchange(1)
        one.open(mine)
        one.post(finished(mine))
    (adopted,) = adopt(tmp_path)
    before = frames.segments(one.folder)
    adopted.finish()
    assert frames.segments(one.folder) == before
    adopted.remove()
    assert journals(tmp_path) == []


async def test_an_open_request_outlives_the_segments_it_began_in(tmp_path: Path) -> None:
    one = Journal(tmp_path, segment_bytes=2000)
    one.start()
    slow = exchange(0, stream=True)
    one.open(slow)
    for number in range(1, 30):
        each = exchange(number)
        one.open(each)
        one.post(finished(each))
    await died(one)
    found = frames.segments(one.folder)
    assert len(found) > 5
    for _, path in found[:-1]:  # shipped
        path.unlink()
    left = [record.request_id for record in recover(one.folder)]
    assert slow.id in left
    assert len(left) == len(set(left))


async def written(root: Path) -> tuple[Journal, bytes, list[str]]:
    """A journal of one segment with three finished requests and two open ones, one of them with a progress mark."""
    one = Journal(root)
    one.start()
    streaming = exchange(5, stream=True)
    one.open(exchange(4))
    one.open(streaming)
    streamed(streaming, 3)
    for number in (1, 2, 3):
        each = exchange(number)
        one.open(each)
        one.post(finished(each))
    one._round = [streaming]
    one._mark_progress()
    await died(one)
    ((_, path),) = frames.segments(one.folder)
    return one, path.read_bytes(), [entry.payload.decode() for entry in entries(one.folder)]


async def test_cut_at_every_byte(tmp_path: Path) -> None:
    one, data, _ = await written(tmp_path)
    ((_, path),) = frames.segments(one.folder)
    seen_before = 0
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        ids = [record.request_id for record in recover(one.folder)]
        assert len(ids) == len(set(ids)), size
        assert len(ids) >= seen_before, "a longer journal knows no fewer requests"
        seen_before = len(ids)
    assert seen_before == 5


async def test_cut_at_every_byte_then_recovered_twice(tmp_path: Path) -> None:
    """Recovery writes behind a torn end, and what it wrote counts once."""
    one, data, _ = await written(tmp_path / "made")
    for size in range(0, len(data), 7):
        root = tmp_path / "cut"
        folder = root / one.id
        shutil.copytree(one.folder, folder)
        ((number, path),) = frames.segments(folder)
        os.truncate(path, size)
        expected = Counter(record.request_id for record in recover(folder))
        for _ in range(2):
            (adopted,) = adopt(root)
            adopted.finish()
            adopted.release()
        assert Counter(record.request_id for record in recover(folder)) == expected
        finals = [entry for entry in entries(folder) if entry.kind == frames.FINAL]
        assert len(finals) == len(expected), (number, size)
        shutil.rmtree(root)


async def test_any_byte_changed_costs_one_entry_and_is_reported(tmp_path: Path) -> None:
    one, data, payloads = await written(tmp_path)
    ((_, path),) = frames.segments(one.folder)
    frames.segment_path(one.folder, 2).write_bytes(frames.CLOSE_FRAME)  # so that it is an old segment
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        damaged = Damaged()
        left = [entry.payload.decode() for entry in entries(one.folder, damaged=damaged)]
        assert left[-1] == ""
        missing = [payload for payload in payloads if payload not in left]
        assert len(missing) == 1, at
        assert len(damaged.places) == 1, at
        ids = [record.request_id for record in recover(one.folder)]
        assert len(ids) == len(set(ids))


def full_disk(folder: Path, size: str = "64k") -> bool:
    """Mount a small tmpfs; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def test_a_full_disk_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    if not full_disk(disk):
        pytest.skip("no tmpfs can be mounted here; the next test gives the same errors by a file size limit")
    try:
        one = Journal(disk / "journal", segment_bytes=16 * 1024)
        one.start()
        slow = exchange(0)
        one.open(slow)
        for number in range(1, 301):
            each = exchange(number)
            one.open(each)
            one.post(finished(each))
        assert "No space" in one.failing or "could be written" in one.failing
        assert one.errors
        assert one.held
        assert one.lost == 0
        said = [message for message in caplog.messages if "cannot be written" in message]
        assert len(said) == 1, "once a minute"
        # room comes back as it does in service: what was shipped is deleted
        first = [(number, path) for number, path in frames.segments(one.folder)][:-1]
        kept = [record for _, path in first for record in _records(path)]
        for _, path in first:
            path.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        await until(lambda: not one.failing, PROGRESS_S * 2.5, "writing again")
        assert one.held == 0
        await died(one)
        ids = Counter([*kept, *(record.request_id for record in recover(one.folder))])
        assert ids == Counter(f"req-{number:06d}" for number in range(301))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _records(path: Path) -> list[str]:
    from gateway.ledger.recovery import decode

    parts = frames.unpack(path.read_bytes())
    return [decode(part.payload).request_id for part in parts if isinstance(part, frames.Frame) and part.kind == 3]


async def test_a_write_that_fails_half_way_leaves_no_half_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk here is not full, so the system's answers are made up: some bytes, then an error, then all well."""
    one = Journal(tmp_path)
    one.start()
    real = os.write
    answers = ["half", "error", "error"]

    def write(fd: int, data: bytes) -> int:
        if fd == one._fd and data and answers:
            if answers.pop(0) == "error":
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, data[: len(data) // 2])
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        one.post(finished(exchange(number)))
    assert one.held == 3
    answers.append("error")
    one._retry()
    assert one.failing
    answers.clear()
    one._retry()
    assert not one.failing
    await died(one)
    damaged = Damaged()
    assert len(list(recover(one.folder, damaged))) == 3
    assert damaged.places == []


async def test_opening_a_journal_beside_others(tmp_path: Path) -> None:
    async with journal(tmp_path) as first, journal(tmp_path) as second:
        assert first.id != second.id
        assert len(journals(tmp_path)) == 2
        await asyncio.sleep(0)
        assert list(adopt(tmp_path)) == []
