"""What a journey needs: the whole gateway on free ports, raw clients, and upstreams that say exactly what they should.

Everything runs over real sockets on one loop. The gateway is `gateway.app.App` behind `gateway.server.Listeners`, as
`llm-gateway serve` builds it; only its keys come from memory instead of a data directory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from gateway.app import App
from gateway.config import Config, Listen, Model, Provider, Secret
from gateway.identity.keys import KeyRing
from gateway.ledger.record import Recent, Record
from gateway.log import RequestLog
from gateway.server import Listeners
from gateway.upstreams.upstream import Timeouts
from tests.replay import Seen

CHAT = "/v1/chat/completions"
SIM_MODEL = "sim"
#: no read of a test waits longer
READ_S = 10.0


def chat(model: str = SIM_MODEL, **more: Any) -> dict[str, Any]:
    """A chat request; `stream` and everything else as given."""
    return {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}], **more}


def provider(
    name: str,
    *urls: str,
    models: Iterable[str | Model] = (SIM_MODEL,),
    runtime: str = "vllm",
    api_key: str = "",
    timeouts: Timeouts | None = None,
    **more: Any,
) -> Provider:
    listed = tuple(Model(one, one) if isinstance(one, str) else one for one in models)
    return Provider(
        name, urls, runtime, Secret(api_key), listed, timeouts=timeouts or Timeouts(), origin="a test", **more
    )


def timeouts(**more: float | None) -> Timeouts:
    return dataclasses.replace(Timeouts(), **more)  # type: ignore[arg-type]  # fields by name


class Gateway:
    """A running gateway. `key` opens everything; `key_for` makes keys that may use some models only."""

    def __init__(self, app: App, listeners: Listeners, ring: KeyRing, keys: dict[str, str], log: Any) -> None:
        self.app = app
        self.listeners = listeners
        self.keys = keys
        self.key = keys["client"]
        self._log = log
        assert listeners.address is not None
        assert listeners.metrics_address is not None
        self.port = listeners.address.port
        self.metrics_port = listeners.metrics_address.port
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def records(self) -> list[Record]:
        return list(self.app.recent)

    @property
    def record(self) -> Record:
        return self.records[-1]

    def log_text(self) -> str:
        """Every request line written so far."""
        assert self.app.log is not None
        self.app.log.flush()
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    async def scrape(self) -> str:
        """The metrics listener's text: open, on loopback."""
        answer = await self.ask("GET", "/metrics", port=self.metrics_port, key=None)
        assert answer.status == 200
        return answer.body.decode()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Iterable[tuple[str, str]] = (),
        *,
        key: str | None = "",
        port: int = 0,
    ) -> Answer:
        """One request on a connection of its own. `key` "" is the client's, None sends none."""
        async with self.connect(port) as client:
            return await client.ask(method, path, body, headers, key=self.key if key == "" else key)

    @asynccontextmanager
    async def connect(self, port: int = 0) -> AsyncIterator[Client]:
        client = await Client.open(port or self.port, self.key)
        try:
            yield client
        finally:
            client.abort()

    async def settled(self, count: int) -> list[Record]:
        """Wait until `count` records are there."""
        await until(lambda: len(self.app.recent) >= count, what=f"{count} records")
        return self.records

    def assert_idle(self) -> None:
        """Nothing is left of any request: no lease, no connection in use, nothing in flight."""
        assert self.app.metrics.in_flight.value == 0
        for upstream in self.app.catalog.upstreams:
            assert upstream.in_flight == 0, upstream
            assert self.app.transport.counts(upstream)[0] == 0, upstream


@asynccontextmanager
async def gateway(
    *providers: Provider,
    limited: dict[str, frozenset[str]] | None = None,
    keyed: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """The gateway in front of `providers`. `limited` makes further keys, by name, for the models given; `keyed` makes
    keys with these fields of their records.
    """
    settings.setdefault("ledger", "data_dir" in settings)  # it is kept there
    settings.setdefault("cache_salt", "off")  # bodies can be compared as they are; test_journey_routing has it on
    settings.setdefault("store", "off")  # most journeys need none, and a server for each takes its time
    config = Config(
        data_dir=settings.pop("data_dir", Path("/nonexistent")),
        listen=Listen("127.0.0.1", 0),
        metrics_listen=Listen("127.0.0.1", 0),
        providers=providers,
        **settings,
    )
    maker = KeyRing(config.data_dir, b"p" * 32)
    keys, kept = {}, []
    for name, models in {"client": None, **(limited or {})}.items():
        keys[name], record = maker.make_key(name)
        kept.append(dataclasses.replace(record, models=None if models is None else tuple(models)))
    for name, fields in (keyed or {}).items():
        keys[name], record = maker.make_key(name)
        kept.append(dataclasses.replace(record, **fields))
    ring = KeyRing(config.data_dir, b"p" * 32, kept)
    with tempfile.TemporaryFile() as log:
        app = App(config, ring)
        app.recent = Recent(10_000)
        if app.log is not None:
            app.log = RequestLog(log.fileno())
        listeners = Listeners(app)
        try:
            await listeners.bind()
            await app.start()
            await listeners.open()
            yield Gateway(app, listeners, ring, keys, log)
        finally:
            await listeners.close()
            await app.stop()


@dataclasses.dataclass
class Answer:
    """A whole answer as it came. `chunks` are its HTTP chunks but the last, empty one; `ended`: framed to its end."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    chunks: list[bytes]
    ended: bool = True

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else None

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        document = self.json()
        assert set(document) == {"error"}, document
        assert set(document["error"]) == {"message", "type", "param", "code"}
        error: dict[str, Any] = document["error"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of every event of a stream, decoded; "[DONE]" as it is."""
        return [decoded(event) for event in self.body.split(b"\n\n") if event and not event.startswith(b":")]


def decoded(event: bytes) -> Any:
    data = event.strip().removeprefix(b"data:").strip()
    return "[DONE]" if data == b"[DONE]" else json.loads(data)


class Client:
    """One connection to the gateway, with nothing between the bytes and the assertions."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self.reader = reader
        self.writer = writer
        self.key = key
        self.framing = ""
        self.left = 0

    @classmethod
    async def open(cls, port: int, key: str = "") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64 * 1024 * 1024)
        return cls(reader, writer, key)

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Iterable[tuple[str, str]] = (),
        *,
        key: str | None = "",
        version: str = "1.1",
    ) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/{version}", "Host: gateway.test"]
        key = self.key if key == "" else key
        if key is not None:
            lines.append(f"Authorization: Bearer {key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw)

    async def head(self) -> Answer:
        """The head of the next answer; its body is still to be read."""
        async with asyncio.timeout(READ_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1")[:-4].split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        answer = Answer(int(status), headers, b"", [])
        length = answer.header("Content-Length")
        self.framing = "chunked" if answer.header("Transfer-Encoding") == "chunked" else "length" if length else "close"
        assert not (length and self.framing == "chunked")
        self.left = int(length or 0)
        return answer

    async def chunk(self) -> bytes:
        """The next HTTP chunk; b"" is the last. IncompleteReadError if the connection ends before it."""
        async with asyncio.timeout(READ_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def events(self, count: int) -> bytes:
        """Chunks until they hold `count` events."""
        data = b""
        while data.count(b"\n\n") < count:
            data += await self.chunk()
        return data

    async def rest(self, answer: Answer) -> Answer:
        """Read the body to its end, or to the cut."""
        try:
            if self.framing == "chunked":
                while data := await self.chunk():
                    answer.chunks.append(data)
                answer.body = b"".join(answer.chunks)
            else:
                async with asyncio.timeout(READ_S):
                    whole = self.framing == "length"
                    answer.body = await (self.reader.readexactly(self.left) if whole else self.reader.read())
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            answer.ended = False
            cut = getattr(error, "partial", b"")
            answer.body = b"".join(answer.chunks) if self.framing == "chunked" else cut
        return answer

    async def ask(self, method: str, path: str, *args: Any, **more: Any) -> Answer:
        self.send(method, path, *args, **more)
        answer = await self.head()
        if method == "HEAD":
            return answer
        return await self.rest(answer)

    def abort(self) -> None:
        self.writer.transport.abort()

    def reset(self) -> None:
        """Close with RST: what was received is thrown away, and the peer is told so at once."""
        raw: socket.socket = self.writer.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def leave(self) -> None:
        """Close with FIN."""
        self.writer.close()


Script = Callable[[Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Scripted:
    """An upstream whose POSTs are answered by a script, byte for byte; the script's end closes the connection.

    Probes (GET) get a model list. `lost_at`: when a client of it was gone, in loop time.
    """

    def __init__(self, script: Script | None = None, *, answer: bytes = b"", keep: bool = False) -> None:
        self.script = script
        self.answer = answer
        self.keep = keep
        self.seen: list[Seen] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> Scripted:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1")[:-4].split("\r\n")
                method, path, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(method, path, headers, body)
                if method == "GET":
                    writer.write(whole(b'{"object":"list","data":[{"id":"sim"}]}'))
                    continue
                self.seen.append(seen)
                if self.script is not None:
                    await self.script(seen, reader, writer)
                else:
                    writer.write(self.answer)
                await writer.drain()
                if not self.keep:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


def whole(body: bytes, content_type: str = "application/json", status: str = "200 OK", extra: str = "") -> bytes:
    """An unstreamed answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str = "a", **more: Any) -> bytes:
    """One event of a chat stream, as vLLM writes it."""
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": SIM_MODEL,
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **more,
    }
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


FINISH = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
DONE = b"data: [DONE]\n\n"


@contextmanager
def deaf() -> Iterator[int]:
    """A port that takes no more connections and refuses none: its queue is full."""
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = int(full.getsockname()[1])
        for _ in range(3):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", port))
        time.sleep(0.02)
        yield port


async def until(true: Callable[[], Any], within_s: float = 5.0, what: str = "") -> float:
    """Wait until `true()`; the seconds it took. Fails after `within_s`."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    while not true():
        waited_s = loop.time() - began_at
        assert waited_s < within_s, f"not within {within_s:g} s: {what or true}"
        await asyncio.sleep(0.002)
    return loop.time() - began_at
