"""Faults on demand: what a simulated engine does wrong, for a whole server or for one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import orjson


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All off by default. Times in seconds; `*_at_token` counts generated tokens of the first choice.

    Where they apply: the connection's own (`black_hole`, `close_idle_*`) always, the rest to POST requests, or, with
    `paths`, to every request whose target starts with one of them (`("/",)`: all). `times` limits the server's faults
    to that many requests.
    """

    paths: list[str] = []
    times: int | None = None

    # the connection
    black_hole: bool = False  # accepts, reads nothing
    reset: bool = False  # RST once the request has been read
    silent: bool = False  # reads the request, never answers
    close_idle_s: float | None = None  # closes after an answer, unannounced; 0: right behind it
    close_idle_random_s: float | None = None  # the same at a random time up to this

    # timing
    slow_headers_s: float = 0.0
    first_token_s: float = 0.0  # added to the prefill; the sequence holds its slot
    token_s: float = 0.0  # added between tokens

    # the answer breaks
    status: int = 0  # answers this status with an error in vLLM's shape
    retry_after: str | float | None = None
    cut_at_byte: int | None = None  # closes after exactly this many bytes of body (framing not counted)
    cut_at_token: int | None = None
    cut_with: Literal["fin", "rst"] = "fin"
    clean_cut_at_token: int | None = None  # well-framed end without finish_reason or [DONE], as Ollama's runner dies
    error_event_at_token: int | None = None  # error event, then [DONE], as vLLM's worker dies
    kill_at_token: int | None = None  # the whole engine dies, as from kill -9
    down_s: float | None = None  # and starts again after this long; None: when it is told to
    stall_at_token: int | None = None  # no more bytes, no close, as llama-server after SIGTERM
    ping_s: float = 0.0  # while nothing else is sent: the comment ":\n\n" this often, as llama-server

    # headers
    bad_headers: Literal["", "control", "giant", "smuggle"] = ""
    headers: list[tuple[str, str]] = []  # added to the answer

    # framing
    chunk: int = 0  # bytes per write, each in its own turn of the loop; 0: whole
    events_per_write: int = 1  # events gathered into one HTTP chunk and one write
    line_end: Literal["\n", "\r\n", "\r"] = "\n"
    comment_every: int = 0  # a comment line before every n-th event
    big_event_bytes: int = 0  # the first content event's line gets this long
    close_delimited: bool = False  # neither content-length nor chunked: the end of the connection ends the body
    content_length: bool = False  # a stream with content-length instead of chunks

    # contents
    # last: vLLM's way, an own chunk with `choices: []` behind the finish, if asked for; after_finish: the same
    # unasked; finish: in the chunk with finish_reason; every: in every chunk; zeros: zeros in every chunk, the true
    # numbers last (Ollama's completions); litellm: like last, with a choice `{"index":0,"delta":{}}`; missing: never
    usage: Literal["last", "finish", "every", "after_finish", "missing", "zeros", "litellm"] = "last"
    body: Any = None  # str or bytes: the verbatim body, status 200 unless `status` is set
    content_type: str = "application/json"
    tokens: int | None = None  # the answer's natural length, its end token included
    tool_call: bool = False  # call the first tool although the model had the choice

    @property
    def stops_after(self) -> int | None:
        """The token after which the engine goes no further for this request."""
        points = (
            self.cut_at_token,
            self.clean_cut_at_token,
            self.error_event_at_token,
            self.kill_at_token,
            self.stall_at_token,
        )
        return min((point for point in points if point is not None), default=None)

    def merged(self, changes: Mapping[str, Any]) -> Faults:
        """These with `changes` over them; ValueError names what is wrong."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        try:
            return msgspec.convert({**values, **changes}, Faults)
        except msgspec.ValidationError as error:
            raise ValueError(f"faults: {error}") from None


NONE = Faults()


def parse_pairs(text: str) -> dict[str, Any]:
    """`"cut_at_byte=10; silent"` -> `{"cut_at_byte": 10, "silent": True}`; values are JSON, or else plain text."""
    pairs: dict[str, Any] = {}
    for item in text.split(";"):
        name, equals, value = item.strip().partition("=")
        if not name:
            continue
        if not equals:
            pairs[name] = True
            continue
        try:
            pairs[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            pairs[name] = value
    return pairs
