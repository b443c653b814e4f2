"""Whose turn it is while all upstreams are full. Pure: the clock is passed in, and a place is whatever has room.

- `fair`     the queue: who waits, who is next, who is shed, how long it takes
- `contest`  what it is made of: turns, accounts of tenants, lanes, contests
- `heap`     a heap whose entries can move

May import nothing. `gateway.dispatch.gate` lets requests wait in it.
"""
