"""`llm-gateway sim serve | replay`: simulated engines in the foreground, or on a virtual clock; and the engine behind
the provider `demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

from gateway.sim.control import Control
from gateway.sim.engine import Engine, Pace
from gateway.sim.faults import NONE, Faults, parse_pairs
from gateway.sim.replay import cli as replay
from gateway.sim.runtimes import RUNTIMES
from gateway.sim.server import SimServer

DEMO_OPENING = (
    "This is a simulated engine, not a language model: no runtime was found, so the gateway answers with "
    "prepared sentences to show that streaming works. "
)


def demo_engine(port: int = 0) -> SimServer:
    """The preset behind the provider `demo`: model "demo", about 40 tokens/s, and a text that says what it is."""
    engine = Engine(speed=1.0, pace=Pace(a=0.05, c=0.025, d=0.0, e=0.0))
    return SimServer(("demo",), engine=engine, port=port, opening=DEMO_OPENING, keep=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="sim_command", required=True)
    serve = commands.add_parser("serve", help="run simulated engines until interrupted")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="port of the first engine; 0: any free port")
    serve.add_argument("--engines", type=int, default=1, help="how many, on consecutive ports")
    serve.add_argument("--model", action="append", help="model name to serve; may be repeated (default: sim)")
    serve.add_argument("--speed", type=float, default=1.0, help="1: a 32B model on two H100; 0: instant (default: 1)")
    serve.add_argument("--speeds", type=_speeds, metavar="1,1,0.5", help="one for each engine; says how many, too")
    serve.add_argument("--blocks", type=int, default=20_000, help="KV blocks of 16 tokens of each engine")
    serve.add_argument("--context", type=int, default=32_768, help="longest prompt and answer in tokens")
    serve.add_argument("--runtime", choices=sorted(RUNTIMES), default="vllm", help="whose dialect (default: vllm)")
    serve.add_argument("--slots", type=int, default=256, help="sequences that an engine works on at a time")
    serve.add_argument("--start-delay", type=float, default=0.0, metavar="SECONDS", help="what a start takes")
    serve.add_argument("--metrics-lag", type=float, default=0.0, metavar="SECONDS", help="how old /metrics is")
    serve.add_argument("--control", type=int, metavar="PORT", help="POST /sim/kill, /sim/revive, /sim/faults there")
    serve.add_argument(
        "--fault", action="append", default=[], metavar="KEY=VALUE", help="e.g. cut_at_token=5; may be repeated"
    )
    serve.set_defaults(sim=serve_engines)
    replayed = commands.add_parser("replay", help="what each routing policy would make of a load")
    replay.add_arguments(replayed)
    replayed.set_defaults(sim=lambda args, loop_factory: replay.run(args))


def run(args: argparse.Namespace, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> int:
    code: int = args.sim(args, loop_factory)
    return code


def serve_engines(args: argparse.Namespace, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. 2 for unusable arguments, 1 if an address is taken. Faster with uvloop's
    `new_event_loop` as `loop_factory`."""
    try:
        faults = NONE.merged(parse_pairs(";".join(args.fault)))
    except ValueError as error:
        print(f"--fault: {error}")
        return 2
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_serve(args, faults))
    except OSError as error:
        print(f"cannot listen: {error}")
        return 1
    return 0


async def _serve(args: argparse.Namespace, faults: Faults) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    models = tuple(args.model or ["sim"])
    speeds = args.speeds or [args.speed] * args.engines
    fleet: list[SimServer] = []
    async with AsyncExitStack() as stack:
        for index, speed in enumerate(speeds):
            server = SimServer(
                models,
                engine=Engine(speed=speed, blocks=args.blocks, max_sequences=args.slots),
                faults=faults,
                host=args.host,
                port=args.port + index if args.port else 0,
                context=args.context,
                keep=0,
                start_delay_s=args.start_delay,
                metrics_lag_s=args.metrics_lag,
                runtime=args.runtime,
            )
            await stack.enter_async_context(server)
            fleet.append(server)
            print(f"simulated engine {index + 1}: {server.url}  models: {', '.join(models)}", flush=True)
        if args.control is not None:
            control = await stack.enter_async_context(Control(fleet, args.control))
            print(f"control: {control.root}/sim", flush=True)
        await stop.wait()


def _speeds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
