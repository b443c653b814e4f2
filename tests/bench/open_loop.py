"""The latency measure: a fixed arrival rate over a few connections, each latency counted from the schedule.

    python -m tests.bench.open_loop '{"port": 8700, ...}'   # the fields of `Job`; prints one JSON object

Counting from the moment a request was due, not from the moment it could be sent, keeps a stalled contestant
from hiding its stall (coordinated omission). Blocking sockets and `select`, because libuv's timers have
millisecond steps, and the latencies here are smaller.
"""

import json
import re
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from . import answers, load, machine

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One run: `rate_per_s` unstreamed requests for `duration_s` over kept-alive `connections`."""

    port: int
    cores: Sequence[int]
    contestant: Sequence[int] = ()
    mock: Sequence[int] = ()
    connections: int = 8
    prompt_bytes: int = 1024
    rate_per_s: float = 100.0
    duration_s: float = 4.0
    grace_s: float = 5.0


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _complete(received: bytes) -> str | None:
    """None while the answer is incomplete, "" when it is the right one, else the kind of error."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return None
    length = _LENGTH.search(head)
    if length is None:
        return "no_length"
    if len(body) < int(length[1]):
        return None
    if not head.startswith(b"HTTP/1.1 200"):
        return f"status_{head[9:12].decode('ascii', 'replace')}"
    return "" if body == answers.completion() else "wrong_bytes"


def measure(job: Job) -> dict[str, object]:
    """Run `job`; the same shape of result as the closed loop's, with `latency_ms`."""
    request = load.request_bytes(load.Job(job.port, job.cores, prompt_bytes=job.prompt_bytes))
    idle = deque(_connect(job.port) for _ in range(job.connections))
    waiting: dict[socket.socket, tuple[float, bytearray]] = {}
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    busy = machine.Busy(job.cores)
    cpu = [machine.cpu_s(job.contestant), machine.cpu_s(job.mock), time.process_time()]
    started_at = time.perf_counter()
    total, due = round(job.rate_per_s * job.duration_s), 0
    ends_at = started_at + job.duration_s + job.grace_s
    while (due < total or waiting) and (now := time.perf_counter()) < ends_at:
        while due < total and idle and started_at + due / job.rate_per_s <= now:
            connection = idle.popleft()
            waiting[connection] = (started_at + due / job.rate_per_s, bytearray())
            connection.sendall(request)
            due += 1
        pause_s = 0.05
        if due < total and idle:
            pause_s = max(0.0, started_at + due / job.rate_per_s - time.perf_counter())
        for connection in select.select(list(waiting), [], [], pause_s)[0]:
            due_at, received = waiting[connection]
            try:
                data = connection.recv(65536)
            except OSError:
                data = b""
            received += data
            verdict = _complete(bytes(received)) if data else "cut"
            if verdict is None:
                continue
            del waiting[connection]
            if verdict:
                errors[verdict] += 1
                connection.close()
                idle.append(_connect(job.port))
            else:
                latencies.append(time.perf_counter() - due_at)
                idle.append(connection)
    for connection in (*idle, *waiting):
        connection.close()
    lost = total - len(latencies) - sum(errors.values())
    if lost:
        errors["unfinished"] += lost
    after = [machine.cpu_s(job.contestant), machine.cpu_s(job.mock), time.process_time()]
    spent = dict(zip(("contestant", "mock", "load"), (b - a for a, b in zip(cpu, after, strict=True)), strict=True))
    window = {
        "s": time.perf_counter() - started_at,
        "exchanges": float(len(latencies)),
        "events": 0.0,
    } | spent
    return {
        "window": {name: round(value, 6) for name, value in window.items()},
        "foreign_pct": busy.foreign_pct(sum(spent.values())),
        "completed": len(latencies),
        "errors": dict(errors),
        "latency_ms": load.percentiles_ms(latencies),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))), flush=True)
