"""Recordings of real runtimes (`curl -i` transcripts), as data: never edited, one folder a runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import replay

RUNTIMES = ("vllm", "llama-server", "llama-server-tools", "ollama", "ollama-proxy-plus", "litellm")


class Transcript(NamedTuple):
    """One request and its answer. `headers` are raw pairs as on the wire; `body` is without chunk framing."""

    request_line: str  # "POST /v1/chat/completions"; "" where the recording has none
    request_body: bytes
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")


@cache
def load(runtime: str, name: str) -> Transcript:
    """The (first) exchange in `tests/transcripts/<runtime>/<name>.txt`."""
    raw = (replay.TRANSCRIPTS / runtime / f"{name}.txt").read_bytes()
    request_line, request_body = "", b""
    for line in raw.split(b"\n")[:2]:
        if line.startswith(b"### BODY "):
            request_body = line[9:]
        elif line.startswith((b"### POST ", b"### GET ", b"### DELETE ")):
            request_line = line[4:].decode()
    recording = replay.load(f"{runtime}/{name}")[0]
    lines = recording.head.split(b"\r\n")[1:-2]
    headers = [(key, value.strip()) for key, _, value in (line.partition(b":") for line in lines)]
    return Transcript(request_line, request_body, recording.status, headers, recording.body)


def section(runtime: str, name: str, index: int) -> bytes:
    """The text after the `index`-th line that starts with `### ` in a recording of a failure, up to the next one.

    The capture script wrote no heads there: the body begins wherever its `tail` cut it.
    """
    raw = (replay.TRANSCRIPTS / runtime / f"{name}.txt").read_bytes()
    parts = raw.split(b"\n### ") if not raw.startswith(b"### ") else raw[4:].split(b"\n### ")
    return parts[index].partition(b"\n")[2] + b"\n"


def streams() -> list[tuple[str, str]]:
    """(runtime, name) of every recorded 200 answer that is a stream of events or lines and has a request."""
    found = []
    for path in sorted(Path(replay.TRANSCRIPTS).glob("*/*.txt")):
        head = path.read_bytes()[:6000].lower()
        if b"text/event-stream" not in head and b"application/x-ndjson" not in head:
            continue
        transcript = load(path.parent.name, path.stem)
        kind = transcript.header(b"content-type")
        if (
            transcript.request_line
            and transcript.status == 200
            and kind.startswith((b"text/event-stream", b"application/x-ndjson"))
        ):
            found.append((path.parent.name, path.stem))
    return found
