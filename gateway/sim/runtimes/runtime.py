"""Runtime: one inference server's ways on the wire, as data; and what its answers are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gateway.sim.dialect import Call

if TYPE_CHECKING:
    from gateway.sim.server import SimServer


class Shape(Protocol):
    """Writes one call's answer. Each method returns one whole event, b"" where there is none; `whole` a body.

    `cached`, `prefill_s` and `decode_s` are set before what needs them is asked for.
    """

    cached: int
    prefill_s: float
    decode_s: float

    def role(self, index: int) -> bytes: ...

    def piece(self, index: int, at: int, made: int) -> bytes: ...

    def ending(self, index: int, made: int) -> list[bytes]:
        """The events of the last token, and that it was the last."""

    def usage(self, made: int) -> bytes: ...

    def whole(self, created_at: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    name: str
    #: header lines of every answer; of streams; of those after which the connection is promised to be kept
    headers: bytes
    dated: bool
    stream_headers: bytes = b""
    kept_headers: bytes = b""
    json_type: str = "application/json"
    stream_type: str
    #: the connection ends with a streamed answer, whatever its head promised
    closes_streams: bool = False
    closes_errors: bool = False
    #: when a stream's head is sent: at once, or when the request is worked on (until then: not a byte)
    head: Literal["at_once", "admitted"] = "at_once"
    #: the body of the 503 while it starts; None: nothing listens then
    loading: bytes | None = None
    #: GET path -> content type and body
    pages: Mapping[str, Callable[[SimServer], tuple[str, bytes]]]
    #: the text of its metrics page, as things are now
    exposition: Callable[[SimServer], str]
    #: POST path -> whether it is a chat
    calls: Mapping[str, bool]
    embeddings: str | None = None
    not_found: bytes
    wrong_method: bytes | None = None  # None: not found, too
    unauthorized: bytes
    load: Callable[[bytes], dict[str, Any]]
    #: as `dialect.parse_call`
    parse: Callable[..., Call]
    shape: Callable[[Call, int, int], Shape]
    error: Callable[[int, str, str], bytes]
    error_event: bytes
