"""Where the time of a contestant goes, under requests and under streams.

With py-spy (installed as a command) the process is sampled and runs at full speed; without it, it runs under
cProfile, which makes Python functions look dearer than they are. Either way the shares are applied to the CPU
time per request or event of a run that was not profiled.
"""

import collections
import pstats
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import machine, measures
from .contestants import PLANS, Contestant, NotReady, Place
from .session import Options

_TOP = 20
_SECONDS = 6
_SAMPLES_PER_S = 1000
_LOOP = "uvloop (loop, reads, selects)"
_LOADS = {
    "requests": ("exchanges", "request", {"duration_s": float(_SECONDS + 2)}),
    "streams": (
        "events",
        "event",
        {
            "connections": 50,
            "stream": True,
            "tokens": 100,
            "interval_ms": 20,
            "each": _SECONDS // 2 + 1,
            "ramp_s": 0.52,
        },
    ),
}


def profile(options: Options, names: Sequence[str]) -> int:
    """Profile each of `names` under both loads and print the tables; 0 if all could be."""
    machine.raise_open_files(20_000)
    core, harness_core = machine.cores()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as directory:
        place = Place(machine.free_port(), 0, Path(directory) / "mock", harness_core, options.nice)
        mock = Contestant("direct", place)
        try:
            bench = measures.Bench((core, harness_core), mock.pids, options.quick, options.nice)
            for name in names:
                for kind in _LOADS:
                    where = replace(
                        place, upstream_port=mock.port, core=core, directory=Path(directory) / f"{name}-{kind}"
                    )
                    try:
                        _one(name, kind, where, bench)
                    except (NotReady, OSError) as error:
                        print(f"{name}: {error}", file=sys.stderr)
                        failed = 1
        finally:
            mock.close()
    return failed


def _drive(kind: str, port: int, pids: Sequence[int], bench: measures.Bench) -> float:
    """CPU µs per request or event under the load."""
    what, _, fields = _LOADS[kind]
    result = measures.closed(bench, measures.Target(port, pids), **fields)
    if result["errors"]:
        raise NotReady(f"errors under {kind}: {result['errors']}")
    window: dict[str, float] = result["window"]
    return 1e6 * window["contestant"] / window[what]


def _one(name: str, kind: str, place: Place, bench: measures.Bench) -> None:
    plain = Contestant(name, replace(place, port=machine.free_port()))
    spy = shutil.which("py-spy")
    own: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    try:
        unit_us = _drive(kind, plain.port, plain.pids, bench)
        sampled = spy is not None and _sample(spy, kind, plain, place.directory / "samples", bench, own, total)
    finally:
        plain.close()
    if not sampled:
        _trace(name, kind, place, bench, own, total)
    _print(f"{name}, {kind}, by {'py-spy' if sampled else 'cProfile'}", _LOADS[kind][1], unit_us, own, total)


def _sample(
    spy: str,
    kind: str,
    contestant: Contestant,
    out: Path,
    bench: measures.Bench,
    own: collections.Counter[str],
    total: collections.Counter[str],
) -> bool:
    """py-spy beside the load; False if it may not look at other processes here."""
    command = [
        spy,
        "record",
        "-p",
        str(contestant.pid),
        "-d",
        str(_SECONDS),
        "-r",
        str(_SAMPLES_PER_S),
        "-f",
        "raw",
        "-o",
        str(out),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=machine.pinned(bench.cores[1])
    ) as recorder:
        try:
            _drive(kind, contestant.port, contestant.pids, bench)
            recorder.wait(_SECONDS + 20)
        finally:
            recorder.kill()
    if recorder.returncode or not out.exists():
        return False
    for line in out.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [_place(frame) for frame in stack.split(";") if not frame.startswith("thread")]
        if frames:
            own[_LOOP if _is_loop(frames[-1]) else frames[-1]] += int(count)
            for frame in set(frames):
                total[frame] += int(count)
    return bool(own)


def _place(frame: str) -> str:
    """`name (path/file.py:12)` -> `package/file.py name`."""
    found = re.fullmatch(r"(.*) \((.*?)(?::\d+)?\)", frame)
    return f"{_short(found[2])} {found[1]}" if found else frame


def _is_loop(where: str) -> bool:
    """uvloop is C: what it does itself shows as the time of the function that runs it."""
    return where.startswith("asyncio/runners.py") and where.endswith("run")


def _short(path: str) -> str:
    if not path.startswith("/"):
        return path
    for mark in ("/site-packages/", f"{machine.ROOT}/"):
        if mark in path:
            return path.rpartition(mark)[2]
    return "/".join(path.split("/")[-2:])


def _trace(
    name: str,
    kind: str,
    place: Place,
    bench: measures.Bench,
    own: collections.Counter[str],
    total: collections.Counter[str],
) -> None:
    """Run the contestant under cProfile, drive it, end it, read what it wrote."""
    out = place.directory / "profile"
    place = replace(place, port=machine.free_port())
    module = PLANS[name](place).command[2:]
    if PLANS[name](place).command[1] != "-m":
        raise NotReady("not a Python module: install py-spy to see where its time goes")
    wrapper = [sys.executable, "-m", "tests.bench.profiling", str(out), *module]
    contestant = Contestant(name, place, instead=wrapper)
    try:
        _drive(kind, contestant.port, contestant.pids, bench)
    finally:
        contestant.close()
    if not out.exists():
        raise NotReady(f"no profile was written: {contestant.tail()}")
    for (path, _, function), (_, _, spent, within, _) in pstats.Stats(str(out)).stats.items():  # type: ignore[attr-defined]
        if "select.epoll" not in function:
            where = f"{_short(path)} {function}" if path != "~" else function
            own[_LOOP if _is_loop(where) else where] += round(spent * 1e6)
            total[where] += round(within * 1e6)


def _print(
    title: str, unit: str, unit_us: float, own: collections.Counter[str], total: collections.Counter[str]
) -> None:
    samples = sum(own.values())
    print(f"\n{title}: {unit_us:.1f} µs of CPU per {unit}, unprofiled")
    rooms: collections.Counter[str] = collections.Counter()
    for where, count in own.items():
        rooms[_room(where)] += count
    for heading, counter in (("by package", rooms), ("own time", own), ("with what it calls", total)):
        print(f"\n  {heading:52} {'share':>6}  µs per {unit}")
        for where, count in counter.most_common(_TOP):
            if count < samples / 1000:
                break
            print(f"  {where[:52]:52} {count / samples:6.1%}  {count / samples * unit_us:6.2f}")


def _room(where: str) -> str:
    """gateway files one by one, libraries by package, the rest as the interpreter's."""
    if where == _LOOP:
        return where
    path = where.partition(" ")[0]
    if path.startswith(("gateway/", "middleware/", "tests/")):
        return path
    return path.partition("/")[0] if "/" in path and not path.startswith("lib") else "python and C"


def _child(out: str, module: str, arguments: list[str]) -> None:
    """In the profiled process: run `module` as `python -m` would, and write the profile when it ends."""
    import cProfile

    sys.argv = [module, *arguments]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    recorder = cProfile.Profile(time.process_time)  # the wall clock would count waiting as work
    try:
        recorder.runcall(runpy.run_module, module, run_name="__main__", alter_sys=True)
    finally:
        recorder.dump_stats(out)


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], sys.argv[3:])
