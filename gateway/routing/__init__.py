"""Decisions about a fleet: who may be asked, who is asked, and what a failure means. Pure: the clock is passed in.

- `fair`      whose turn it is while everyone is busy; `contest` and `heap` are what it is made of

May import nothing but errors; what it decides about comes as a Protocol or as plain numbers. Upstreams own the live
objects, `handlers.dispatch` asks and acts.
"""
