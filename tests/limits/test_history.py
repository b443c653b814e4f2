"""What eight processes admitted on one limit, read afterwards: no window may hold more than burst + rate * t.

While the store is killed and comes back, in the middle of it all, each process grants its share by itself: a window
that touches that time may hold more by what the processes had not heard of each other, less than a burst.
"""

from __future__ import annotations

import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path

from tests.limits.worker import BURST, PER_S
from tests.store_fixtures import Server

ROOT = Path(__file__).parents[2]
PROCESSES = 8
SECONDS = 3.0

Admitted = tuple[int, int, int, int]  # before, after (us), amount, alone


def excess(history: list[Admitted]) -> float:
    """By how much the fullest window passes burst + rate * t; negative if none does.

    A window from just before one admission began to just after another ended holds every admission between the two.
    """
    by_end = sorted(history, key=lambda one: one[1])
    begins = sorted({one[0] for one in history})
    worst = -float("inf")
    for start in begins:
        total = 0
        for before, after, amount, _ in by_end[bisect_left(by_end, start, key=lambda one: one[1]) :]:
            if before >= start:
                total += amount
                worst = max(worst, total - (BURST + PER_S * (after - start) / 1e6))
    return worst


def test_the_checker_finds_what_is_too_much() -> None:
    second = 1_000_000
    fits = [(0, 1, BURST, 0), (second, second + 1, int(PER_S), 0)]
    assert -1 < excess(fits) <= 0
    assert excess([*fits, (second, second + 1, 1, 0)]) > 0


def run(server: Server, kill: bool) -> tuple[list[Admitted], int, int]:
    """The history, and when the store was killed and there again (monotonic microseconds)."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.limits.worker", server.url, str(number), str(1 / PROCESSES), str(SECONDS),
             str(int(number == 0))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for _ in range(10):
        time.sleep(SECONDS / 25)
        server.ask("SCRIPT", "FLUSH")
    killed = time.monotonic_ns() // 1000
    if kill:
        server.kill()
        time.sleep(0.5)
        server.start()
    back = time.monotonic_ns() // 1000
    history: list[Admitted] = []
    for process in processes:
        out, _ = process.communicate(timeout=SECONDS + 15)
        assert process.returncode == 0
        for line in out.splitlines():
            before, after, amount, alone = map(int, line.split())
            history.append((before, after, amount, alone))
    return history, killed, back


def test_no_window_holds_more_than_the_limit(store_server: Server) -> None:
    history, _, _ = run(store_server, kill=False)
    assert not any(alone for *_, alone in history)
    assert excess(history) <= 0
    # And the limit is not kept by admitting little.
    assert sum(one[2] for one in history) >= 0.9 * (BURST + PER_S * SECONDS)


def test_a_store_that_dies_costs_a_burst_and_no_more(store_server: Server) -> None:
    history, killed, _ = run(store_server, kill=True)
    alone = [one[1] for one in history if one[3]]
    assert alone, "the store was away, so somebody decided alone"
    shared_again = max(alone)
    assert excess([one for one in history if one[1] < killed]) <= 0
    after = [one for one in history if one[0] > shared_again]
    assert after
    assert excess(after) <= 0
    assert excess(history) <= BURST  # a fifth of it on a quiet machine
