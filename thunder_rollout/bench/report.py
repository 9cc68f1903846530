"""What a run of the bench leaves beside bench.json: report.md to quote, bench.csv to compute with, plots.

Means are over seeds, with 95% intervals of Student's t; ratios of `adaptive` to another policy are paired by
seed, for all policies play the same programs.
"""

from __future__ import annotations

import csv
import importlib.util
import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thunder_rollout.bench.cell import CellResult
from thunder_rollout.bench.intervals import Interval, interval, paired_ratio
from thunder_rollout.bench.prefill_cost import PrefillCost, read_prefill_costs
from thunder_rollout.bench.store import FILE, read_rows
from thunder_rollout.observe.console import table_console

logger = logging.getLogger(__name__)

OURS = "adaptive"
COST_TERMS = ("decode", "prefill", "recompute", "unused", "caching")
_TABLE_WIDTH = 205
_PREAMBLE = (
    "Means over repetitions with 95% intervals (Student's t); ratios are paired by seed. Costs are shares of "
    "KV capacity x time; caching is an upper bound, for contexts count as held during each tool call. Latency is from "
    "a turn's request to its last token. Drift is what the scheduler believed of an engine's cache and the engine's "
    "report corrected, as a share of its KV: mean (and most) of the windows' 95th percentiles."
)
_COLUMNS = (
    "load", "programs", "policy", "steps/min", f"{OURS} / it", "KV hits", "of infinite KV", "latency p50 / p95 s",
    "longest wait s", "imbalance", "drift p95", "ended", ", ".join(COST_TERMS),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The repetitions of one policy at one load. `over` is `adaptive` over it, seed by seed."""

    rows: tuple[CellResult, ...]
    over: Interval | None

    @property
    def first(self) -> CellResult:
        return self.rows[0]

    @property
    def steps_per_min(self) -> Interval:
        return interval([row.steps_per_min for row in self.rows])

    @property
    def kv_hit_rate(self) -> Interval:
        return interval([row.kv_hit_rate for row in self.rows])

    @property
    def of_infinite_kv(self) -> float:
        shares = [row.kv_hit_rate / row.infinite_kv_hit_rate for row in self.rows if row.infinite_kv_hit_rate]
        return statistics.fmean(shares) if shares else float("nan")

    def cost(self, term: str) -> float:
        return statistics.fmean(row.cost_shares[term] for row in self.rows)

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(row, field) for row in self.rows)


def summaries(rows: Iterable[CellResult]) -> list[Summary]:
    """By model, workload and load, in the order of their first rows, loads rising."""
    cells: dict[tuple[str, str, float], dict[str, dict[int, CellResult]]] = {}
    for row in rows:
        cells.setdefault((row.model, row.workload, row.load), {}).setdefault(row.policy, {})[row.seed] = row
    places = list(dict.fromkeys((model, workload) for model, workload, _ in cells))
    found = []
    for key in sorted(cells, key=lambda key: (places.index(key[:2]), key[2])):
        steps = {policy: _steps(by_seed) for policy, by_seed in cells[key].items()}
        for policy, by_seed in cells[key].items():
            over = paired_ratio(steps.get(OURS, {}), steps[policy]) if policy != OURS else None
            found.append(Summary(rows=tuple(by_seed.values()), over=over))
    return found


def write_report(folder: Path, *, plots: bool = True, console: Console | None = None) -> None:
    """Everything from bench.json in `folder`; the table is printed too."""
    rows = read_rows(folder / FILE)
    if not rows:
        logger.warning("no cell is measured yet: nothing to report")
        return
    found = summaries(rows)
    write_csv(rows, folder / "bench.csv")
    (folder / "report.md").write_text(markdown(found, read_prefill_costs(folder)))
    print_table(found, console)
    for line in filter(None, _mixture(rows)):
        logger.warning(line)
    if plots and importlib.util.find_spec("matplotlib") is None:
        logger.warning("no plots: matplotlib is not installed (`pip install matplotlib`)")
    elif plots:
        from thunder_rollout.bench.plots import draw_all

        draw_all(found, folder)
    logger.info("written: %s", folder)


def write_csv(rows: Sequence[CellResult], path: Path) -> None:
    """One line a cell."""
    names = [f.name for f in fields(CellResult) if f.name != "cost_shares"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"cost_{term}" for term in COST_TERMS)])
        for row in rows:
            values = asdict(row)
            writer.writerow([*(values[name] for name in names), *(row.cost_shares[term] for term in COST_TERMS)])


def markdown(found: Sequence[Summary], costs: Sequence[PrefillCost]) -> str:
    """What the policies' ratios come to, then one table for each model and workload."""
    lines = [_PREAMBLE, *_mixture(row for summary in found for row in summary.rows), "", *_overview(found)]
    for (model, workload), group in groupby(found, key=lambda s: (s.first.model, s.first.workload)):
        same = list(group)
        first = same[0].first
        lines += [
            "",
            f"### {workload}, {model}",
            "",
            f"KV tokens of the engines: {', '.join(map(str, first.kv_tokens))}; {_repetitions(same)} repetitions.",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"|{'---|' * len(_COLUMNS)}",
            *(f"| {' | '.join(_cells(summary))} |" for summary in same),
            "",
            *_conclusions(same),
        ]
    if costs:
        lines += ["", "### What a lost cache costs", "", *map(_prefill_line, costs)]
    return "\n".join(lines) + "\n"


def _overview(found: Sequence[Summary]) -> list[str]:
    """A line for each model, workload and load: `adaptive`, and how many times another policy's steps it does."""
    others = list(dict.fromkeys(summary.first.policy for summary in found if summary.first.policy != OURS))
    columns = ["workload", "model", "load", f"{OURS}, steps/min", *(f"/ {policy}" for policy in others)]
    lines = [f"| {' | '.join([*columns, 'KV hits of infinite KV'])} |", f"|{'---|' * (len(columns) + 1)}"]
    for (model, workload, load), group in groupby(found, key=lambda s: (s.first.model, s.first.workload, s.first.load)):
        by_policy = {summary.first.policy: summary for summary in group}
        if (ours := by_policy.get(OURS)) is None:
            continue
        overs = [by_policy[policy].over if policy in by_policy else None for policy in others]
        ratios = [str(over) if over is not None else "" for over in overs]
        cells = [f"`{workload}`", model, f"{load:g}", ours.steps_per_min.text(0), *ratios, f"{ours.of_infinite_kv:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def print_table(found: Sequence[Summary], console: Console | None = None) -> None:
    console = table_console(console, _TABLE_WIDTH)
    table = Table(title="thunder-rollout bench")
    for name in ("workload", "model", *_COLUMNS):
        table.add_column(name, justify="left" if name in ("workload", "model", "policy") else "right")
    for _, group in groupby(found, key=lambda s: (s.first.model, s.first.workload, s.first.load)):
        for summary in group:
            table.add_row(summary.first.workload, summary.first.model, *_cells(summary))
        table.add_section()
    console.print(table)


def _mixture(rows: Iterable[CellResult]) -> list[str]:
    """What keeps rows from being compared, where something does."""
    counts = Counter(row.core for row in rows)
    if len(counts) < 2:
        return []
    told = ", ".join(f"{number} by {core or 'one that was not recorded'}" for core, number in counts.items())
    return ["", f"**The scheduler's source changed between rows**: {told} (`core` in bench.json)."]


def _steps(by_seed: dict[int, CellResult]) -> dict[int, float]:
    return {seed: row.steps_per_min for seed, row in by_seed.items()}


def _cells(summary: Summary) -> list[str]:
    first = summary.first
    limit = f" ({first.max_programs})" if first.max_programs is not None else ""
    past = sum(row.num_waits_past_rule for row in summary.rows)
    return [
        f"{first.load:g}",
        str(first.num_programs),
        first.policy + limit,
        summary.steps_per_min.text(0),
        str(summary.over) if summary.over is not None else "",
        str(summary.kv_hit_rate),
        f"{summary.of_infinite_kv:.2f}",
        f"{summary.mean('turn_latency_p50_s'):.1f} / {summary.mean('turn_latency_p95_s'):.1f}",
        f"{max(row.longest_wait_s for row in summary.rows):.0f}" + (f" ({past} past the rule)" if past else ""),
        f"{summary.mean('imbalance'):.2f}",
        _drift(summary),
        f"{sum(row.num_ended for row in summary.rows)}",
        ", ".join(f"{summary.cost(term):.2f}" for term in COST_TERMS),
    ]


def _drift(summary: Summary) -> str:
    """Of capacity, mean and most of the repetitions that have it."""
    drifts = [row.drift_p95 for row in summary.rows if row.drift_p95 is not None]
    return f"{100 * statistics.fmean(drifts):.1f}% (to {100 * max(drifts):.1f}%)" if drifts else ""


def _conclusions(same: Sequence[Summary]) -> list[str]:
    """Of one model and workload: `adaptive` beside the best of the others, and beside the best peak at any load."""
    peak = max(same, key=lambda summary: summary.steps_per_min.mean)
    lines = []
    for load, group in groupby(same, key=lambda summary: summary.first.load):
        by_policy = {summary.first.policy: summary for summary in group}
        ours = by_policy.pop(OURS, None)
        if ours is None or not by_policy:
            continue
        best = max(by_policy.values(), key=lambda summary: summary.steps_per_min.mean)
        mean = ours.steps_per_min.mean
        lines.append(
            f"- Load {load:g}: {OURS} does {mean / best.steps_per_min.mean:.2f} of the best other's mean "
            f"({best.first.policy}) and {mean / peak.steps_per_min.mean:.2f} of the best peak ({peak.first.policy} at "
            f"{peak.first.load:g}); its hits are {ours.of_infinite_kv:.2f} of those of infinite KV."
        )
    return lines


def _repetitions(same: Sequence[Summary]) -> str:
    counts = sorted({len(summary.rows) for summary in same})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _prefill_line(cost: PrefillCost) -> str:
    return (
        f"- {cost.model}: prefilling a mean context of {cost.context_tokens} tokens takes an engine "
        f"{cost.prefill_s:.2f} s, {cost.ratio:.1f} times a turn's share of decoding ({cost.output_tokens} tokens in "
        f"{cost.decode_share_s:.3f} s, {cost.num_together} turns together)."
    )
