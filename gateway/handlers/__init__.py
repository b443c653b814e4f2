"""The way of a request: resolve, dispatch, relay; and one file for each API surface.

- `proxy`     the three verbs in one visible function, and what a surface is
- `resolve`   capped body, typed peek, route, may this principal? Gives a Plan; touches no upstream
- `gate`      how many requests an upstream has at once, and the queue of those that find no room
- `dispatch`  picks an upstream, leases it, sends; the client has seen nothing yet
- `wording`, `verdict`, `hedge`   of dispatch: what is sent, what a reply says of its upstream, a second attempt beside
- `waiting`   comments to a client whose stream has nothing to say yet
- `relay`     the commit point: the answer's bytes to the client, through the meter
- `openai`, `local`, `providers`, `ollama`, `system`   the surfaces

May import catalog, upstreams, runtimes, wire, dialects, exchange and errors. `dispatch` cannot reach the client's
response and `relay` has no pool: so nothing can be sent twice once the client has seen a byte.
"""
