"""One answer on the wire: head, framing, and the faults of both."""

from __future__ import annotations

from http import HTTPStatus

from gateway.sim.connection import Connection
from gateway.sim.faults import Faults

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Response:
    """One answer on the wire. `send` returns False once the connection has been cut."""

    __slots__ = (
        "_chunked",
        "_events",
        "_gathered",
        "_keep_alive",
        "_piece",
        "_promised",
        "_sent",
        "connection",
        "faults",
        "live",
    )

    def __init__(self, connection: Connection, faults: Faults, keep_alive: bool) -> None:
        self.connection = connection
        self.faults = faults
        self.live = True
        self._keep_alive = keep_alive and not faults.close_delimited
        self._promised = self._keep_alive  # what the head says
        self._chunked = False
        self._piece = faults.chunk
        self._sent = 0  # body bytes
        self._events = 0
        self._gathered: list[bytes] = []

    def begin(
        self, status: int, content_type: str, length: int | None, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Write the head. Without `length` the body is chunked."""
        faults = self.faults
        ways = self.connection.server.runtime
        lines = [
            b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown")),
            self.connection.server.common_headers(),
        ]
        if content_type == ways.stream_type:
            lines.append(ways.stream_headers)
            self._keep_alive = self._keep_alive and not ways.closes_streams
        elif status >= 400 and ways.closes_errors:
            self._promised = self._keep_alive = False
        self._chunked = (length is None or faults.bad_headers == "smuggle") and not faults.close_delimited
        if length is not None and not faults.close_delimited:
            lines.append(b"content-length: %d\r\n" % length)
        elif faults.bad_headers == "smuggle":
            lines.append(b"content-length: 5\r\n")
        if content_type:
            lines.append(b"content-type: %b\r\n" % content_type.encode("latin-1"))
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(ways.kept_headers if self._promised else b"connection: close\r\n")
        if faults.bad_headers == "control":
            lines.append(b"x-bad: a\x01b\x7fc\x0bd\r\n")
        elif faults.bad_headers == "giant":
            lines.append(b"x-giant: " + b"g" * (1 << 20) + b"\r\n")
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in (*headers, *faults.headers)]
        self.connection.write(b"".join(lines) + b"\r\n", self._piece)

    def event(self, payload: bytes) -> bool:
        """Send one SSE event (LF line ends), decorated as the faults ask."""
        faults = self.faults
        self._events += 1
        if faults.comment_every and self._events % faults.comment_every == 0:
            payload = b": comment\n\n" + payload
        if faults.line_end != "\n":
            payload = payload.replace(b"\n", faults.line_end.encode())
        if faults.events_per_write > 1:
            self._gathered.append(payload)
            if len(self._gathered) < faults.events_per_write:
                return self.live
            return self.flush()
        return self.send(payload)

    def flush(self) -> bool:
        if self._gathered:
            payload = b"".join(self._gathered)
            self._gathered.clear()
            self.send(payload)
        return self.live

    def send(self, payload: bytes) -> bool:
        if not self.live:
            return False
        size = len(payload)
        limit = self.faults.cut_at_byte
        if limit is not None and self._sent + size >= limit:
            self.live = False
            payload = payload[: limit - self._sent]
        self._sent += len(payload)
        if self._chunked:
            end = b"\r\n" if self.live else b""
            payload = b"%x\r\n%b%b" % (size, payload, end)
        self.connection.write(payload, self._piece)
        if not self.live:
            self.connection.cut(self.faults.cut_with)
        return self.live

    def end(self) -> None:
        """End the body as framed, and let the connection go on."""
        if not self.flush():
            return
        if self._chunked:
            self.connection.write(b"0\r\n\r\n", self._piece)
        self.connection.done(self._keep_alive, self.faults)
