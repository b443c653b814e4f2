"""The way of a request for a model through the gateway, from its body to the last byte of its answer.

- `proxy`         the handler of all such routes: the steps in one visible function, and what a surface is
- `resolve`       capped body, typed peek, route, may this principal? Gives a `dispatch.plan`; touches no upstream
- `admission`     what it is estimated to use, asked of the limits
- `waiting`       comments to a client whose stream has nothing to say yet
- `relay`         the commit point: the answer's bytes to the client, through the meter
- `continuation`  what is kept of an answer that could go on elsewhere, and asking for the rest

May import dispatch, continuation, catalog, upstreams, runtimes, wire, answer, exchange and errors. `gateway.dispatch`
cannot reach the client's response and `relay` has no pool: so nothing can be sent twice once the client has seen a
byte.
"""
