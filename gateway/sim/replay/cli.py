"""`llm-gateway sim replay`: its arguments, its table, its JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.routing.policies import DEFAULT, POLICIES
from gateway.sim.replay import study
from gateway.sim.replay.fleet import Hardware
from gateway.sim.replay.loads import BUCKET_S, SYNTHETIC, Arrival, BadTrace, faster, read_trace, synthetic
from gateway.sim.replay.plot import svg

OK, WRONG = 0, 2
PREFIX: Final = "synthetic:"
_COLUMNS: Final = (
    ("ttft_mean_s", "mean"),
    ("ttft_p50_s", "p50"),
    ("ttft_p90_s", "p90"),
    ("ttft_p99_s", "p99"),
    ("hit_rate", "hit rate"),
    ("share_max_over_mean", "max/mean"),
    ("knee_rate", "knee/s"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Hardware()
    made = ", ".join(PREFIX + name for name in SYNTHETIC)
    parser.add_argument("load", metavar="LOAD", help=f"a trace in Mooncake's form (JSON lines), or {made}")
    parser.add_argument("--policy", type=_policies, default=[DEFAULT], metavar="NAMES", help="all, or name,name")
    parser.add_argument(
        "--engines", type=_counts, default=[8], metavar="N", help="how many; several (4,8,16) with --target-p90"
    )
    parser.add_argument("--target-p90", type=_positive, metavar="SECONDS", help="how many engines keep that p90?")
    parser.add_argument(
        "--rate", type=_positive, default=1.0, metavar="FACTOR", help="arrivals this many times as fast"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="the first N (of a made load: 12000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is left to chance")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="mean over N seeds")
    parser.add_argument(
        "--sweep", type=_factors, default=study.SWEEP, metavar="F,F", help="rates for the knee, as factors; 0 for none"
    )
    parser.add_argument(
        "--sweep-requests", type=int, default=1500, metavar="N", help="requests for each of these rates"
    )
    parser.add_argument(
        "--bucket", type=float, default=BUCKET_S, metavar="SECONDS", help="arrivals are spread over this"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the figures")
    engine = parser.add_argument_group("an engine", "as it stands: about a 32B model on one H100, with a large cache")
    engine.add_argument("--prefill-rate", type=_positive, default=default.rate, metavar="TOKENS", help="a second")
    engine.add_argument("--cache-tokens", type=int, default=default.cache_tokens, metavar="N", help="its KV memory")
    engine.add_argument(
        "--step-tokens", type=int, default=default.step_tokens, metavar="N", help="a step takes at most"
    )
    engine.add_argument("--sequences", type=int, default=default.sequences, metavar="N", help="it works on at once")
    engine.add_argument("--decode-s", type=_positive, default=default.decode_s, metavar="S", help="its shortest step")
    engine.add_argument("--speeds", type=_speeds, default=(), metavar="1,1,0.5", help="factors of the engines, in turn")
    engine.add_argument("--index-tokens", type=int, metavar="N", help="what the gateway takes the KV memory for")
    engine.add_argument("--no-feedback", action="store_true", help="engines do not report their cached tokens")


def run(args: argparse.Namespace) -> int:
    """Run the study; figures go to stdout, what is wrong to stderr."""
    if len(args.engines) > 1 and args.target_p90 is None:
        return _wrong("several numbers of engines are for --target-p90")
    try:
        loads = [_load(args, args.seed + n, args.engines[0]) for n in range(max(1, args.seeds))]
    except (OSError, BadTrace) as error:
        return _wrong(str(error))
    if args.target_p90 is not None:
        return _plan(args, loads)
    fleet = _fleet(args, args.engines[0])
    policies: dict[str, dict[str, Any]] = {}
    if not args.json:
        _head(args, loads[0], fleet)
    for name, found in study.compare(loads, fleet, args.policy, factors=args.sweep, sweep_requests=args.sweep_requests):
        policies[name] = found
        if not args.json:
            sys.stdout.write(_row(name, found))
            sys.stdout.flush()
    if args.plot is not None:
        try:
            args.plot.write_text(svg(f"{args.load}, {args.engines[0]} engines", policies))
        except OSError as error:
            return _wrong(str(error))
    if args.json:
        document = {
            "load": args.load,
            "requests": len(loads[0]),
            "rate": round(study.rate_of(loads[0]), 4),
            "engines": args.engines[0],
            "seeds": len(loads),
            "policies": policies,
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return OK


def _plan(args: argparse.Namespace, loads: Sequence[Sequence[Arrival]]) -> int:
    """How many engines the load needs, by policy."""
    policies: dict[str, Any] = {}
    for policy in args.policy:

        def p90_s(engines: int, policy: str = policy) -> float:
            fleet = _fleet(args, engines)
            ((_, found),) = study.compare(loads, fleet, [policy], factors=())
            return float(found["ttft_p90_s"])

        seen, needed = study.engines_needed(p90_s, args.target_p90, args.engines)
        policies[policy] = {"ttft_p90_s": {str(size): p90 for size, p90 in seen.items()}, "engines_needed": needed}
        if not args.json:
            tried = ", ".join(f"{size}: {p90:.2f} s" for size, p90 in seen.items())
            answer = f"{needed} engines" if needed else f"more than {max(args.engines)} engines"
            sys.stdout.write(f"{policy:<16} {answer} for a p90 of {args.target_p90:g} s   ({tried})\n")
            sys.stdout.flush()
    if args.json:
        document = {"load": args.load, "target_p90_s": args.target_p90, "policies": policies}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return OK


def _load(args: argparse.Namespace, seed: int, engines: int) -> list[Arrival]:
    if args.load.startswith(PREFIX):
        name = args.load.removeprefix(PREFIX)
        if name not in SYNTHETIC:
            raise BadTrace(f"{args.load}: there are {', '.join(PREFIX + one for one in SYNTHETIC)}")
        arrivals = synthetic(name, seed, args.requests or 12_000, engines)
    else:
        arrivals = read_trace(Path(args.load), seed, args.requests, args.bucket)
    return faster(arrivals, args.rate) if args.rate != 1.0 else arrivals


def _fleet(args: argparse.Namespace, engines: int) -> study.Fleet:
    hardware = Hardware(args.prefill_rate, args.cache_tokens, args.step_tokens, args.sequences, args.decode_s)
    return study.Fleet(engines, hardware, args.speeds, args.index_tokens, not args.no_feedback)


def _head(args: argparse.Namespace, arrivals: Sequence[Arrival], fleet: study.Fleet) -> None:
    tokens = sum(one.prompt.tokens for one in arrivals)
    full = study.rate_of(arrivals) * tokens / len(arrivals) / fleet.engines / fleet.hardware.rate
    sys.stdout.write(
        f"{len(arrivals)} requests, {study.rate_of(arrivals):.2f}/s, {tokens / len(arrivals):.0f} prompt tokens each; "
        f"{fleet.engines} engines of {fleet.hardware.rate:g} tokens/s, {full:.0%} busy if nothing were cached\n\n"
        f"{'time to first token, s':<18}" + "".join(f"{title:>10}" for _, title in _COLUMNS) + "\n"
    )


def _row(name: str, found: dict[str, Any]) -> str:
    cells = (f"{found[key]:>10.3f}" if key in found else f"{'-':>10}" for key, _ in _COLUMNS)
    return f"{name + (' *' if found.get('default') else ''):<22}" + "".join(cells).rstrip() + "\n"


def _wrong(message: str) -> int:
    sys.stderr.write(f"llm-gateway: {message}\n")
    return WRONG


def _policies(text: str) -> list[str]:
    if text == "all":
        return list(POLICIES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(POLICIES)}")
    return names


def _counts(text: str) -> list[int]:
    counts = [int(one) for one in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return counts


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _factors(text: str) -> tuple[float, ...]:
    if text.strip() in ("", "0"):
        return ()
    return tuple(sorted(_positive(one) for one in text.split(",")))


def _speeds(text: str) -> tuple[float, ...]:
    return tuple(_positive(one) for one in text.split(","))
