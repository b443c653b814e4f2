"""Identity: who is asking (`keys`) and what they may do (`principals`).

Data passes one way: a presented key becomes a `Principal` or None, in memory, without awaiting. The
installation's pepper and the key records live in the data directory. This room imports nothing of the gateway.
"""
