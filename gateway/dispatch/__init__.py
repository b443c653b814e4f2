"""Whom a request is sent to, and what becomes of it until an answer begins. The client has seen nothing by then.

- `plan`        what is to be sent, and whom it may be sent to
- `dispatcher`  attempts, one after the other: who may be asked, who has room, who is asked; the lease, the outcome
- `gate`        how many requests an upstream has at once, and the queue of those that find no room
- `asking`      what the policies are told of a prompt and its session; the tenant's cache salt
- `wording`     what is sent: the client's body, spliced where it must differ, and a head of our own
- `hedge`       a second attempt beside one that says nothing
- `verdict`     what a reply says of its upstream, and what the client is told when all attempts failed

Decisions are those of `routing` and `queueing`, which are pure; here they are acted on. May import catalog, upstreams,
runtimes, wire, metrics, exchange and errors.
"""
