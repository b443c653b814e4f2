"""The figures by name; prints a table, writes JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import machine

from . import deaths, fairness, routing

FIGURES: Mapping[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "kills": deaths.kills,
    "black-hole": deaths.black_hole,
    "policies": routing.policies,
    "without-metrics": routing.without_metrics,
    "fairness": fairness.fairness,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench fleet", description=__doc__)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} (default: all)")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--attempts", type=int, help="of each request, for the kills (GATEWAY_ATTEMPTS's default)")
    parser.add_argument("--seconds", type=float, help="of load, for the figures that take so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the JSON file (bench-results/fleet-<date>.json)")
    given = parser.parse_args(argv)
    for wrong in [name for name in given.figures if name not in FIGURES]:
        parser.error(f"no figure {wrong}; there are {', '.join(FIGURES)}")
    began = datetime.now().astimezone()
    found: dict[str, dict[str, Any]] = {}
    for name in given.figures or FIGURES:
        options: dict[str, Any] = {"seed": given.seed}
        if name == "kills":
            options |= {"count": given.kills, "attempts": given.attempts}
        elif given.seconds:
            options["seconds"] = given.seconds
        started = time.monotonic()
        found[name] = uvloop.run(FIGURES[name](**options))
        print(table(name, found[name]), f"({time.monotonic() - started:.0f} s)\n", sep="\n", flush=True)
    out = given.out or machine.ROOT / "bench-results" / f"fleet-{began:%Y-%m-%dT%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"date": began.isoformat(timespec="seconds"), "command": list(argv), "machine": machine.facts()}
    out.write_text(json.dumps({**record, "figures": found}, indent=1) + "\n")
    print(f"written: {out}")
    return 0


def table(name: str, figures: Mapping[str, Any]) -> str:
    """Markdown that reads as plain text: groups of figures as rows, single figures in a list below."""
    groups = {row: values for row, values in figures.items() if isinstance(values, dict) and row != "kinds"}
    lines = [f"### {name}", ""]
    if groups:
        columns = list(dict.fromkeys(column for values in groups.values() for column in values))
        rows = [["", *columns], *([row, *(str(values.get(c, "")) for c in columns)] for row, values in groups.items())]
        widths = [max(len(row[at]) for row in rows) for at in range(len(columns) + 1)]
        shown = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
        lines += [shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:], ""]
    lines += [f"- {label.replace('_', ' ')}: {value}" for label, value in figures.items() if label not in groups]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
