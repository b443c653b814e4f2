"""`python -m tests.bench fleet`: what a fleet behind the gateway does, over real sockets. Figures, not tests.

The engines are `sim serve` in one process, broken by its control door; the gateway is `python -m gateway serve` in
another; the clients are here. Two cores hold all three, so times are those of a busy machine, and ratios are what to
look at.

    stand     starts and ends the processes; clients in open and closed loops
    deaths    kills under load; an engine that has gone silent
    routing   policies on conversations; metrics out of reach
    fairness  a tenant that asks for ten times its share
    command   the figures by name, the table, the JSON file
"""
