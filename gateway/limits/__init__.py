"""Limits: how much of what a principal may use, taken in one atomic step before a request runs, settled after it.

`spec` is the data (limits, budgets), `bucket` the arithmetic; both are pure. May import the store and the errors.
"""
