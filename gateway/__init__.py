"""Local LLM Gateway: the edge proxy in front of local LLM runtimes. This is the map.

Rooms
    cli, __main__   the command line; imports what a command needs, when it needs it
    config          environment, .env, TOML and flags -> a frozen Config, or every problem at once
    welcome, detect the first run: look for runtimes on this machine, or bring the simulated engine; the greeting
    doctor          what is wrong with this machine and with the store
    server          listeners, one client connection (aiohttp's protocol, adapted), signals, drain
    app             composition root: makes every room and joins them; the only module that knows them all
    router          from a request's path and method to its handler
    exchange        Exchange: the one record a request carries from its first byte to its last
    errors          one error tree, and its bodies in each API family
    answer          what the gateway says itself: JSON, errors, status lines, as bytes
    metrics, log    every metric; the one log line per request
    catalog         providers, models, aliases -> an immutable route Table, swapped whole
    importers       other gateways' configurations -> our TOML
    fleet           what changes it while it runs: reloads, DNS names, drains
    identity        principals (who may do what), keys (made, hashed, looked up)
    oidc            tokens of a trusted issuer (JWT) instead of keys; optional
    ledger          what was used and owed: a record of each request, journal, sums in the store, reports
    limits          token buckets, slots and budgets: decided here where they can be, in the store where they must
    admin           the operator's side: keys, usage, upstreams and the queue over HTTP
    store           what gateways share, behind the Redis protocol: Redis, Valkey, or the embedded Valkey
    wire            SANS-IO: request bodies, headers, SSE, NDJSON, the token meter
    continuation    an answer that broke off, gone on with elsewhere: pure
    runtimes        what differs between vLLM, llama.cpp, Ollama, LocalAI, LiteLLM, LM Studio: data
    routing         decisions about a fleet: who may be asked, who is asked, what a failure means: pure
    upstreams       one upstream address (load, health); transport: prompts and answers; control: probes, management
    queueing        whose turn it is while all upstreams are full: pure
    dispatch        whom a request is sent to: attempts, room and queue, leases, what a reply says of its upstream
    passage         the way of a request for a model: resolve, admission, relay, comments, continuation
    handlers        the API surfaces, a file for each
    sim             the simulated engine: tests, demonstration, benchmarks; `sim replay` compares policies on a trace
    middleware/     (beside this package) the order is in its `stack`

Imports go downwards; tests/test_imports.py holds the table and fails on a breach. `wire`, `errors`, `exchange`,
`runtimes`, `routing` and `queueing` are pure: no I/O, no clock. Bytes reach runtimes through
`upstreams.transport` only, aiohttp's ClientSession lives in `upstreams.control` only, prometheus_client in `metrics`
and `app`, redis in `store`.

The way of a request
    server -> middleware (metrics, errors, hygiene, auth, rate limit) -> Router -> passage.proxy.Proxy:
        resolve   understand the body; the offers it may go to, and those of its fallbacks; decides without awaiting
        dispatch  while attempts are left: who may be asked (routing.eligible), who has room (gate; else the fair
                  queue), who is asked (routing.policies); lease it, send, wait for the first content. What fails
                  until then is the breaker's business and another attempt's: the client has seen nothing
        relay     the commit point: bytes to the client as they are read, through the meter; nothing is sent twice.
                  A stream that breaks off is gone on with by another upstream (passage.continuation)
        waiting   beside both: comments to a client whose stream has nothing to say yet
    then App._settle, synchronous, once, whatever happened: usage, queue, limits, metrics, record, log line; and only
    then the end of the answer.

Where things are added: a runtime is a file in `runtimes` and a line in RUNTIMES; a middleware is a file and a line in
`stack`; a surface is an entry in a SURFACES table; a setting is a field of Config and a line in `config.settings`;
a metric is an attribute of Metrics and the call where the fact happens.
"""

__version__ = "0.1.0"
