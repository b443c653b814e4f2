"""Limits: how much of what a principal may use, taken in one atomic step before a request runs, settled after it.

- `spec`     what a limit and a budget are, and how they are read; pure
- `bucket`   the arithmetic of a bucket, in integers; pure, the reference for `take.lua`
- `estimate` what a request will use, learned upward from what was used; pure
- `local`    a process's side of a bucket: what it has on loan, what it owes, its share when on its own
- `redis`    the store's side: batches of decisions, one call of `take.lua` in flight at a time
- `texts`    what a refusal says
- `limiter`  `admit` and `settle`, which is all that others use

A process borrows a part of each large bucket and decides most requests from that without asking. What is on loan
counts against the burst, so no window of t seconds admits more than burst + rate * t over all processes, as long as
the store keeps what it was told. While it is away each process grants its share of each limit by itself, and takes
that off the bucket afterwards, so that the shares of all add up. A window that touches an outage may hold more by what
the processes had not heard of each other when it began and ended, and, if the store forgot, by that: each less than a
burst.

A limit reached is 429; a budget spent is 402 in OpenAI's shape of `insufficient_quota` with `x-should-retry: false`,
for waiting a little does not help. A budget admits while anything is left of it, and reserves what each request is
estimated to use, so it is passed by one request at most, as far as the estimates hold. Those of answers whose length
nobody bounded may not, nor those of prompts unlike any before: what such a request uses beyond its estimate is charged
while its answer still comes, and while a bucket is in debt nothing is admitted.

May import the store and the errors.
"""
