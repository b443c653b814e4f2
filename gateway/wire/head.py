"""The head of an upstream's answer, read once for all answers that come with the same bytes.

A runtime says the same head with every answer, but for its Date, which changes once a second. So heads are kept by
their bytes (`HeadCache`), with what was made of them: framing facts, and the lines the client gets.
"""

from __future__ import annotations

from typing import Final

from gateway.wire.headers import response_headers

_STREAM_TYPES: Final = (b"text/event-stream", b"application/x-ndjson")
_KEPT: Final = 256
_KEPT_BYTES: Final = 2048


class ResponseHead:
    """Status, header pairs as received, and what framing they say (RFC 9112, section 6.3).

    Shared between answers: never changed. `content_length` is None where the framing is chunked or until close.
    """

    __slots__ = (
        *("_lines", "chunked", "content_length", "content_type", "dated", "headers", "lines", "status"),
        "streaming",
    )

    def __init__(self, block: bytes, status: int) -> None:
        """Read the status line and header lines in `block`, which a strict parser has accepted.

        Raises ValueError, in words, for a framing that was not asked for.
        """
        self.status = status
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.content_length: int | None = None
        self.streaming = False
        self.lines = False  # streaming NDJSON, not SSE
        self.chunked = False
        self.dated = False
        self._lines: bytes | None = None
        for line in block.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            value = value.strip(b" \t")
            self.headers.append((name, value))
            lower = name.lower()
            if lower == b"content-type":
                self.content_type = value
                self.streaming = value[:20].lower().startswith(_STREAM_TYPES)
                self.lines = self.streaming and value[:1] in b"aA"
            elif lower == b"content-length":
                self.content_length = int(value)
            elif lower == b"date":
                self.dated = True
            elif lower == b"transfer-encoding":
                if self.chunked or value.lower() != b"chunked":
                    raise ValueError("it used a transfer coding that was not asked for")
                self.chunked = True

    def header(self, name: bytes) -> bytes:
        """The first value of a header, by its lower-case name; b"" for none."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    def client_lines(self) -> bytes:
        """The header lines for the client, as `response_headers` makes them. Raises UpstreamBroken."""
        if self._lines is None:
            self._lines = response_headers(self.headers)
        return self._lines

    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} {self.content_type.decode('latin-1')}>"


class HeadCache:
    """Heads by their bytes, bounded."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[bytes, ResponseHead] = {}

    def read(self, block: bytes, status: int) -> ResponseHead:
        """The head in `block` (up to its empty line). Raises ValueError as ResponseHead does."""
        head = self._heads.get(block)
        if head is None:
            head = ResponseHead(block, status)
            if len(block) <= _KEPT_BYTES:
                if len(self._heads) >= _KEPT:
                    self._heads.clear()
                self._heads[block] = head
        return head
