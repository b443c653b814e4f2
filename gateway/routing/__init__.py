"""Decisions about a fleet: who may be asked, who is asked, and what a failure means. Pure: the clock is passed in.

- `policies`  which of those that may be asked is: one table of pure functions, `sticky` the default
- `load`      what this process put on an upstream and learned of its speed; the lease that counts a request on it
- `prefix`    prompts as chained hashes, and what an engine is believed to hold of them, bounded in bytes
- `breaker`   one upstream's circuit breaker: ejected, on trial, slowly back
- `eligible`  which of a pool may be asked now
- `retries`   what each way of failing means (again? whose fault?), and how many requests may be sent again

May import nothing but errors; what it decides about comes as a Protocol or as plain numbers. Upstreams own the live
objects, `gateway.dispatch` asks and acts.
"""
