"""A replay, not a runtime: a real-socket server that answers with recordings of real runtimes.

The recordings are `curl -i` transcripts under `tests/transcripts/<runtime>/`: made with a real server, never edited.
Status line, header lines and body are sent as recorded, byte for byte. curl removes the chunk framing of a chunked
answer, so that alone is made anew: one chunk per line, as the runtimes send theirs.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

TRANSCRIPTS = Path(__file__).parent / "transcripts"
_HEAD = re.compile(rb"^HTTP/1\.[01] \d{3}[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n", re.M)


@dataclass(frozen=True)
class Recording:
    """One recorded answer. `head` ends with the empty line; `body` is without chunk framing."""

    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def chunked(self) -> bool:
        return b"transfer-encoding: chunked" in self.head.lower()

    def header(self, name: str) -> str:
        found = re.search(rb"(?im)^" + name.encode() + rb": *([^\r\n]*)", self.head)
        return found[1].decode() if found else ""


def load(name: str) -> list[Recording]:
    """The answers in `tests/transcripts/<name>.txt`, in order; lines of the capture script (`### …`) are left out."""
    data = (TRANSCRIPTS / f"{name}.txt").read_bytes()
    heads = list(_HEAD.finditer(data))
    assert heads, f"no answer in {name}"
    recordings = []
    for match, following in zip(heads, [*heads[1:], None], strict=True):
        head = match[0]
        rest = data[match.end() : following.start() if following else len(data)]
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        # the capture script wrote "\n### curl rc=0" after an answer, or the next heading right after its last line
        body = rest[: int(length[1])] if length else re.sub(rb"(?:\n### curl rc|(?<=\n)### ).*", b"", rest, flags=re.S)
        recordings.append(Recording(head, body))
    return recordings


@dataclass
class Seen:
    """One request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Faults:
    """What this replay does worse than the recording: waits before each line, cuts the connection after n bytes of
    body, closes at once instead of answering, or stays silent."""

    line_s: float = 0.0
    cut_bytes: int | None = None
    hang_up: bool = False
    silent: bool = False


@dataclass
class Replay:
    """`async with Replay({("GET", "/api/tags"): load(…)}) as replay:` serves on `replay.url`.

    A route's recordings are served in turn and the last one again and again; other paths get an empty 404.
    """

    routes: dict[tuple[str, str], list[Recording]]
    faults: Faults = field(default_factory=Faults)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        #: set as soon as a peer has closed its side
        self.peer_left = asyncio.Event()
        self.connections = 0
        self._turns: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Replay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer), name="replay connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (seen := await _read_request(reader)) is not None:
                self.seen.append(seen)
                if self.faults.hang_up:
                    return
                if not await self._answer(seen, reader, writer):
                    return
            self.peer_left.set()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.peer_left.set()
        finally:
            writer.close()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send the recording; False if the connection must not be used again."""
        route = (seen.method, seen.path)
        recordings = self.routes.get(route)
        if self.faults.silent:
            await self._watch(reader)
            return False
        if recordings is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return True
        turn = self._turns.get(route, 0)
        self._turns[route] = turn + 1
        recording = recordings[min(turn, len(recordings) - 1)]
        writer.write(recording.head)
        sent = 0
        watch = asyncio.create_task(self._watch(reader)) if recording.chunked else None
        try:
            for line in recording.body.splitlines(keepends=True) if recording.chunked else [recording.body]:
                await asyncio.sleep(self.faults.line_s)
                if self.peer_left.is_set():
                    return False
                if self.faults.cut_bytes is not None:
                    line = line[: self.faults.cut_bytes - sent]
                if line:
                    writer.write(b"%x\r\n%b\r\n" % (len(line), line) if recording.chunked else line)
                    await writer.drain()
                sent += len(line)
                if self.faults.cut_bytes is not None and sent >= self.faults.cut_bytes:
                    return False
            if recording.chunked:
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        finally:
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
        return b"connection: close" not in recording.head.lower()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Notice that the peer leaves while it is owed bytes. Peers here never pipeline: nothing else can come."""
        try:
            if not await reader.read(1):
                self.peer_left.set()
        except ConnectionError:
            self.peer_left.set()


async def _read_request(reader: asyncio.StreamReader) -> Seen | None:
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, body)
