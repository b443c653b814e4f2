"""From runs to tables: medians, ratios to the reference of the same round, spread, and who was disturbed."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .contestants import REFERENCE
from .measures import METRICS

_ABSENT = "–"
_LEGEND = (
    "Medians of {rounds} round(s); in brackets the ratio to " + REFERENCE + " in the same round. `*` the harness "
    "was the limit, `~` another program disturbed a run, INVALID: an answer was missing, cut or changed."
)


@dataclass(frozen=True)
class Cell:
    """One figure of one contestant over the rounds; `ratio` is the median of the rounds' ratios."""

    median: float
    low: float
    high: float
    ratio: float | None
    rounds: int


def kept(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One run per (contestant, measure, round): the first undisturbed one, else the least disturbed."""
    best: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["contestant"], row["measure"], row["round"])
        other = best.get(key)
        if other is None or (other["noisy"] and row.get("foreign_pct", 0) < other.get("foreign_pct", 0)):
            best[key] = row
    return list(best.values())


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """metric -> contestant -> round -> value, with what is counted against `direct` added."""
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        for name, value in row.get("figures", {}).items():
            values[name][row["contestant"]][row["round"]] = value
    for name, metric in METRICS.items():
        base = values.get(metric.minus_direct, {}).get("direct", {})
        for contestant, rounds in list(values.get(metric.minus_direct, {}).items()):
            if contestant != "direct":
                values[name][contestant] = {n: rounds[n] - base[n] for n in rounds if n in base}
    for name in [name for name in values if name.startswith(("cpu_", "ceiling_cpu_"))]:
        values[name].pop("direct", None)  # without a proxy there is no proxy's CPU
    return values


def cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Cell]]:
    """metric -> contestant -> Cell, for the runs in `rows` (one per round: see `kept`)."""
    table: dict[str, dict[str, Cell]] = {}
    values = _figures(rows)
    for name in METRICS:
        reference = values.get(name, {}).get(REFERENCE, {})
        for contestant, rounds in values.get(name, {}).items():
            if not rounds:
                continue
            ratios = [value / reference[n] for n, value in rounds.items() if min(value, reference.get(n, 0)) > 0]
            figures = list(rounds.values())
            table.setdefault(name, {})[contestant] = Cell(
                statistics.median(figures),
                min(figures),
                max(figures),
                statistics.median(ratios) if ratios else None,
                len(figures),
            )
    return table


def invalid(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, int]]:
    """(contestant, measure) -> errors by kind, for whoever dropped or changed anything in any run."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        for kind, count in row["errors"].items():
            errors = found.setdefault((row["contestant"], row["measure"]), {})
            errors[kind] = errors.get(kind, 0) + count
    return found


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads as plain text."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def text(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([text(head), f"|{rule}|", *map(text, body)])


def tables(rows: Sequence[Mapping[str, Any]], contestants: Sequence[str]) -> str:
    """All tables in Markdown: figures, spread, conditions."""
    chosen = kept(rows)
    found = cells(chosen)
    broken = invalid(rows)
    measure_of = {name: row["measure"] for row in rows for name in row.get("figures", {})}
    bound = {(row["contestant"], row["measure"]) for row in chosen if row["harness_bound"]}
    noisy = {(row["contestant"], row["measure"]) for row in chosen if row["noisy"]}
    figures, spread = [], []
    for name, metric in METRICS.items():
        if name not in found:
            continue
        measure = measure_of[metric.minus_direct or name]
        row, ranges = [metric.label], [metric.label]
        for contestant in contestants:
            cell, key = found[name].get(contestant), (contestant, measure)
            if key in broken:
                row.append("INVALID")
                ranges.append("INVALID")
            elif cell is None:
                row.append(_ABSENT)
                ranges.append(_ABSENT)
            else:
                marks = ("*" if key in bound else "") + ("~" if key in noisy else "")
                ratio = f" ({cell.ratio:.2f}x)" if cell.ratio is not None else ""
                row.append(f"{cell.median:{metric.form}}{marks}{ratio}")
                ranges.append(f"{cell.low:{metric.form}}..{cell.high:{metric.form}}")
        figures.append(row)
        spread.append(ranges)
    parts = [
        _grid(["", *contestants], figures),
        _LEGEND.format(rounds=1 + max((row["round"] for row in rows), default=0)),
        _grid(["min..max", *contestants], spread),
        _conditions(chosen, contestants),
    ]
    for (contestant, measure), errors in broken.items():
        counts = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        parts.append(f"INVALID {contestant} {measure}: {counts}")
    return "\n\n".join(parts)


def _conditions(rows: Sequence[Mapping[str, Any]], contestants: Sequence[str]) -> str:
    """Who used the cores in each measure: medians in percent of one core, foreign load at its worst."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["measure"]][row["contestant"]].append(row)
    body = []
    for measure, by_contestant in groups.items():
        cells = [measure]
        for contestant in contestants:
            runs = by_contestant.get(contestant, [])
            if not runs:
                cells.append(_ABSENT)
                continue
            own, mock, made = (
                statistics.median(run[f"{who}_pct"] for run in runs) for who in ("contestant", "mock", "load")
            )
            foreign = max(run.get("foreign_pct", 0.0) for run in runs)
            errors = sum(sum(run["errors"].values()) for run in runs)
            cells.append(f"{own:.0f} / {mock:.0f}+{made:.0f} / {foreign:.0f} / {errors}")
        body.append(cells)
    return _grid(["CPU %: it / mock+load / foreign / errors", *contestants], body)


def headline(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The run in a few lines: the machine, the versions, the commit, how noisy it was."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    again = sum(1 for row in rows if row["attempt"])
    changed = " with changes" if facts["changed"] else ""
    return (
        f"{facts['cpu'] or facts['arch']}, {facts['cores']} cores, Linux {facts['kernel']}; {versions}; "
        f"commit {facts['commit'] or 'unknown'}{changed}; {len(rows)} runs, {again} of them repeated for noise"
    )
