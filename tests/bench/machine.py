"""Clocks and counters of this machine: CPU time, memory, how busy the cores are, versions (Linux)."""

import contextlib
import ctypes
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: addresses of the mock runtime, each a host of its own to who asks it; Linux answers to all of 127.0.0.0/8
LOOPBACK = [f"127.0.0.{number}" for number in range(1, 9)]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds (user + system, all threads) used so far by `pids`; a process that is gone counts 0.

    Reads the process's CPU clock (clock_getcpuclockid(3)): nanoseconds, where /proc/PID/stat has 10 ms ticks.
    """
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory of `pids`, added up."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total


def tree(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(parents.get(parent, ()))
    return found


class Busy:
    """How much of `cores` was used by whom, between construction and `foreign_pct()`."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._names = {f"cpu{core}" for core in cores}
        self._at = time.monotonic()
        self._before = self._read()

    def _read(self) -> float:
        """Seconds of user, nice and system time on the cores, and time stolen from them (proc_stat(5))."""
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in self._names:
                # Interrupt time is left out: it serves the loopback traffic of the measurement itself.
                ticks += sum(int(fields[i]) for i in (0, 1, 2, 7) if i < len(fields))
        return ticks / _TICKS_PER_S

    def foreign_pct(self, own_s: float) -> float:
        """Percent of one core used by anything but the measurement, which itself used `own_s` CPU seconds."""
        elapsed_s = max(time.monotonic() - self._at, 1e-9)
        return round(max(0.0, 100 * (self._read() - self._before - own_s) / elapsed_s), 1)


def cores() -> tuple[int, int]:
    """The core of the contestant, and that of the mock and the load; the same one if there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[1] if len(usable) > 1 else usable[0]


def pinned(core: int, nice: int = 0) -> Callable[[], None]:
    """For `Popen(preexec_fn=)`: run on `core` only, and die with the harness, however the harness dies."""

    def set_up() -> None:
        os.sched_setaffinity(0, {core})
        if nice:
            os.nice(nice)
        _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)

    return set_up


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raise_open_files(wanted: int) -> int:
    """Lift the limit of open files (children inherit it) towards `wanted`; returns what it is then."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return soft


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip()


def facts() -> dict[str, object]:
    """The machine, the versions and the commit, for the record."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = {"python": platform.python_version(), "implementation": sys.implementation.name}
    for package in ("aiohttp", "uvloop", "httptools", "msgspec", "orjson", "prometheus-client"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if nginx := _output("nginx", "-v"):
        versions["nginx"] = nginx.rpartition("/")[2]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
    }
