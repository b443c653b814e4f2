"""One session of measuring: everybody is started, every measure driven in rounds, noisy runs done again."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import machine, measures
from .contestants import Contestant, NotReady, Place

NOISY_PCT = 12.0  # of one core, used by other programs during a run
_WARMING_REQUESTS = 20
_ATTEMPTS = 3
_BOUND_PCT = 95.0
_LOGGED_SHARE = 0.99


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    contestants: Sequence[str]
    measures: Sequence[str]
    rounds: int = 3
    quick: bool = False
    nice: int = 0
    limit_s: float = 450.0  # no run is repeated or begun after this


class Session:
    """The mock and the contestants, up; `rows()` drives them. A context manager, so that all end by pid."""

    def __init__(self, options: Options, say: Callable[[str], None] = print) -> None:
        self.options = options
        self.say = say
        self.failures: dict[str, str] = {}
        self.running: dict[str, Contestant] = {}
        self._stack = ExitStack()
        self._answered: dict[str, int] = {}

    def __enter__(self) -> "Session":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        machine.raise_open_files(20_000)
        self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        core, harness_core = machine.cores()
        mock_place = Place(machine.free_port(), 0, self._directory / "mock", harness_core, self.options.nice)
        self.mock = Contestant("direct", mock_place)
        self._stack.callback(self.mock.close)
        self._place = replace(mock_place, upstream_port=self.mock.port, core=core)
        self.bench = measures.Bench((core, harness_core), self.mock.pids, self.options.quick, self.options.nice)
        for name in self.options.contestants:
            if name == "direct":
                continue
            try:
                self.running[name] = self._stack.enter_context(self._contestant(name, "up"))
            except (NotReady, OSError) as error:
                self.failures[name] = str(error)
                self.say(f"{name}: {error}")

    @contextmanager
    def _contestant(self, name: str, why: str) -> Iterator[Contestant]:
        directory = self._directory / f"{name}-{why}"
        contestant = Contestant(name, replace(self._place, port=machine.free_port(), directory=directory))
        try:
            for _ in range(_WARMING_REQUESTS):
                contestant.ask()
            yield contestant
        finally:
            contestant.close()

    def _plan(self) -> list[tuple[int, str, str]]:
        """(round, measure, contestant) in the order of the runs: contestants take turns, the first one rotates."""
        names = [name for name in self.options.contestants if name not in self.failures]
        return [
            (turn, measure, names[(turn + i) % len(names)])
            for turn in range(self.options.rounds)
            for measure in self.options.measures
            for i in range(len(names))
            # The mock's memory and start are nobody's concern.
            if not (names[(turn + i) % len(names)] == "direct" and measure in measures.FRESH)
        ]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per run: contestant, measure, round, figures, errors, who used how much CPU.

        A noisy run is done again, as far as the time allows: repetitions never cost a later round its run.
        """
        started_at, limit_s = time.monotonic(), self.options.limit_s
        plan = self._plan()
        for done, (turn, measure, name) in enumerate(plan, 1):
            for attempt in range(1 if self.options.quick else _ATTEMPTS):
                elapsed_s = time.monotonic() - started_at
                if elapsed_s > limit_s:
                    self.say(f"out of time in round {turn + 1}")
                    return
                if attempt and elapsed_s > limit_s * done / len(plan):
                    break
                row = self._row(name, measure, turn, attempt)
                self.say(line(row))
                yield row
                if not row["noisy"]:
                    break
                time.sleep(0.5)

    def _row(self, name: str, measure: str, turn: int, attempt: int) -> dict[str, Any]:
        row: dict[str, Any] = {"contestant": name, "measure": measure, "round": turn, "attempt": attempt}
        drive = measures.MEASURES[measure]
        if name == "direct":
            row |= drive(self.bench, measures.Target(self.mock.port, ()))
        elif measure in measures.FRESH:
            try:
                with self._contestant(name, f"{measure}-{turn}-{attempt}") as fresh:
                    time.sleep(0.5)
                    row |= drive(self.bench, measures.Target(fresh.port, fresh.pids))
                    row.setdefault("figures", {})["start_s"] = fresh.start_s
            except NotReady as error:
                row |= {"errors": {"not_ready": 1}, "window": {}, "stderr": str(error)}
        else:
            contestant = self.running[name]
            row |= drive(self.bench, measures.Target(contestant.port, contestant.pids))
            self._answered[name] = self._answered.get(name, 0) + row.get("completed", 0)
            if not contestant.alive():
                row["errors"]["died"] = 1
        window, seconds = row["window"], row["window"].get("s") or 1.0
        for who in ("contestant", "mock", "load"):
            row[f"{who}_pct"] = round(100 * window.get(who, 0.0) / seconds, 1)
        row["noisy"] = row.get("foreign_pct", 0.0) >= NOISY_PCT
        busiest = row["contestant_pct"] >= _BOUND_PCT
        row["harness_bound"] = row["mock_pct"] + row["load_pct"] >= _BOUND_PCT and not busiest
        return row

    def unlogged(self) -> dict[str, str]:
        """Contestants that should have written a log line per request and did not: not the work they claim."""
        missing = {}
        if "gateway" in self.running and (answered := self._answered.get("gateway")):
            time.sleep(0.3)  # lines are written in batches
            with self.running["gateway"].output.open("rb") as output:
                lines = sum(1 for _ in output)
            if lines < _LOGGED_SHARE * answered:
                missing["gateway"] = f"{lines} log lines for {answered} requests"
        return missing


def line(row: dict[str, Any]) -> str:
    """One run in one line, for whoever watches."""
    figures = " ".join(f"{name}={value:.2f}" for name, value in row.get("figures", {}).items())
    cores = " ".join(f"{who}={row[who + '_pct']:.0f}%" for who in ("contestant", "mock", "load"))
    marks = [name for name in ("noisy", "harness_bound") if row[name]]
    marks += [f"{kind}={count}" for kind, count in row["errors"].items()]
    text = f"round {row['round'] + 1} {row['measure']:10} {row['contestant']:13} {figures} | {cores}"
    what = row.get("sample") or row.get("stderr") or ""
    return f"{text} foreign={row.get('foreign_pct', 0):.0f}% {' '.join(marks)} {what}".rstrip()
