"""`llm-gateway sim replay`: what each policy would make of a load, on a virtual clock. For choosing a policy, and for
counting the GPUs that a load needs.

- `loads`   what is asked: a trace in Mooncake's form, or a load made of dice
- `fleet`   one load through one policy: the product's own chooser and what it learns, engines of `sim.engine`
- `study`   many of them: policies, seeds, rates, sizes of the fleet; figures and the knee
- `plot`    the figures as SVG
- `cli`     the command

May import `gateway.routing`, which it is about, and nothing else of the gateway. No I/O but in `cli`, and to read a
trace.
"""
