"""The benchmark: `python -m tests.bench` measures the gateway beside its neighbours in one run.

`answers` holds the bytes the mock runtime says, so that the load generator can demand them byte for
byte; `mock`, `load`, `open_loop` and `bare_proxy` are the processes; `contestants` starts and pins them;
`measures` drives one contestant through one measure; `report` turns runs into tables; `machine` reads the
clocks and counters of /proc; `profiling` says where the time goes. Linux only.
"""
