"""Whose ways the simulated engine has: one file per runtime, each a `Runtime` value, and one line in `RUNTIMES`.

Shapes, headers, closings and errors are those of `tests/sim/recorded*`; where there is no recording the file says so.
"""

from gateway.sim.runtimes.llamacpp import LLAMACPP
from gateway.sim.runtimes.runtime import Runtime
from gateway.sim.runtimes.vllm import VLLM

__all__ = ["RUNTIMES", "Runtime"]

RUNTIMES: dict[str, Runtime] = {"vllm": VLLM, "llamacpp": LLAMACPP}
