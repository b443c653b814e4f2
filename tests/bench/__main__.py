"""`python -m tests.bench`: measure, print the tables, write them down. See README.md beside this file."""

import argparse
import json
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from . import contestants, machine, measures, profiling, report
from .session import Options, Session


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("measure", "profile"), default="measure")
    parser.add_argument("--rounds", type=int, help="rounds per measure (3; 1 with --quick)")
    parser.add_argument("--measures", type=_names, help=", ".join(measures.MEASURES))
    parser.add_argument("--contestants", type=_names, help=", ".join(contestants.PLANS))
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another proxy, started by COMMAND with {port} and {upstream} filled in",
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it work, roughly how fast")
    parser.add_argument("--nice", type=int, default=0, help="scheduling priority of all processes (root: -15)")
    parser.add_argument("--limit", type=float, default=450.0, help="begin no run after this many seconds")
    parser.add_argument("--out", type=Path, help="the JSON file (bench-results/<date>.json)")
    parser.add_argument("--quiet", action="store_true", help="only the tables, not every run")
    return parser


def _options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    also = []
    for text in given.also:
        name, found, command = text.partition("=")
        if not found or not name or not command:
            parser.error(f"--also {text}: expected NAME=COMMAND")
        contestants.add_command(name, command)
        also.append(name)
    taking_part = given.contestants or contestants.available()
    taking_part += [name for name in also if name not in taking_part]
    for wrong in [name for name in taking_part if name not in contestants.PLANS]:
        parser.error(f"no contestant {wrong}; there are {', '.join(contestants.PLANS)}")
    chosen = given.measures or list(measures.MEASURES)
    for wrong in [name for name in chosen if name not in measures.MEASURES]:
        parser.error(f"no measure {wrong}; there are {', '.join(measures.MEASURES)}")
    rounds = given.rounds or (1 if given.quick else 3)
    return Options(taking_part, chosen, rounds, given.quick, given.nice, given.limit)


def measure(options: Options, out: Path | None, *, quiet: bool = False) -> int:
    """Run everything, print and write the results; 0 if every contestant took part and dropped nothing."""
    started_at, began = time.monotonic(), datetime.now().astimezone()
    rows: list[dict[str, Any]] = []
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    interrupted = False
    with Session(options, say) as session:
        try:
            rows.extend(session.rows())
        except KeyboardInterrupt:
            interrupted = True
        unlogged = session.unlogged()
        failures = session.failures
    facts = machine.facts()
    head = report.headline(rows, facts)
    text = report.tables(rows, [name for name in options.contestants if name not in failures]) if rows else ""
    notes = [f"{name} did not take part: {why}" for name, why in failures.items()]
    notes += [f"{name} skipped work: {why}" for name, why in unlogged.items()]
    text = "\n\n".join(filter(None, [text, *notes, head, f"{time.monotonic() - started_at:.0f} s"]))
    print("\n" + text)
    out = out or machine.ROOT / "bench-results" / f"{began:%Y-%m-%dT%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": began.isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "machine": facts,
        "failures": failures | unlogged,
        "table": {
            name: {who: vars(cell) for who, cell in row.items()}
            for name, row in report.cells(report.kept(rows)).items()
        },
        "runs": rows,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(text + "\n")
    print(f"\nwritten: {out} and {out.with_suffix('.md').name}")
    return int(bool(interrupted or failures or unlogged or report.invalid(rows)))


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def main() -> int:
    if not sys.platform.startswith("linux"):
        print("the benchmark reads /proc and pins processes to cores: Linux only", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminated)
    if sys.argv[1:2] == ["fleet"]:
        from .fleet import command

        return command.main(sys.argv[2:])
    parser = _parser()
    given = parser.parse_args()
    options = _options(parser, given)
    if given.action == "profile":
        return profiling.profile(options, given.contestants or ["gateway"])
    return measure(options, given.out, quiet=given.quiet)


if __name__ == "__main__":
    sys.exit(main())
