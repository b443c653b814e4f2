"""Bytes on the wire, without I/O: request bodies, headers, SSE and NDJSON framing, and the token meter.

Pure: standard library, orjson, msgspec and multidict only. Nothing here awaits, opens a socket or reads a clock;
times come in as arguments (seconds on a monotonic clock). Everything is fed bytes in any split and gives bytes back.

- `body`     one pass over a request's JSON: top-level spans, typed peeks, duplicate keys, splices
- `headers`  which headers may pass, in either direction
- `sse`, `ndjson`  cut a stream into events without changing a byte
- `tokens`   `Usage`, and reading it (or an error) from an answer's JSON, in every shape the runtimes use
- `usage`    the meter of an answer as its bytes pass, and that of SSE; the door to `meter`, `documents` and `tokens`
- `meter`    what meters share; `documents`: those of NDJSON and JSON
"""
