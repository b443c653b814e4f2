"""What all gateways of a fleet share, behind the Redis protocol: the only room that speaks it.

- `address`   REDIS_URL understood: one server, Sentinel or Cluster
- `scripts`   a Lua script and its digest
- `breaker`   closed or open, decided from results and a clock; pure
- `connections`  redis-py, set up to keep our promises
- `client`    Store: one call in, one answer or StoreAway out; short timeouts, no retry, nothing cancelled in flight
- `embedded`  the Valkey that the gateway starts itself where no REDIS_URL is set
- `visit`     the same store as an operator's tool asks it: patient, every refusal in words

May import errors and metrics. Nothing here knows what is stored: limits, keys and the ledger bring their own scripts.
This file imports nothing, so that the configuration can be checked without loading redis.
"""
