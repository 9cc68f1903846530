"""What a sweep leaves behind: a table to read, a csv to compute with, plots."""

from __future__ import annotations

import csv
import importlib.util
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thunder_rollout.observe.console import table_console
from thunder_rollout.sim.cells import Row, Score, scores
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.sweep import run_sweep

logger = logging.getLogger(__name__)

_TABLE_WIDTH = 210
COST_TERMS = ("decode", "prefill", "recompute", "unused", "caching")
_RESULT_COLUMNS = (
    "num_turns",
    "measured_s",
    "steps_per_min",
    "kv_hit_rate",
    "kv_load_rate",
    "turn_latency_p50_s",
    "turn_latency_p95_s",
    "wait_p50_s",
    "wait_p99_s",
    "imbalance",
    "makespan_s",
    "num_preemptions",
    "num_pauses",
    "num_rejected",
)
_ROW_COLUMNS = tuple(f.name for f in fields(Row) if f.name != "result")
_SHARE_COLUMNS = ("bound_share", "hit_share", "clairvoyant_share")
_DECILES = tuple(f"wait_p99_decile_{number}_s" for number in range(1, 11))


def simulate(config: SimulateConfig, folder: Path, console: Console | None = None) -> list[Score]:
    """Run the sweep; write `sim.csv` and the plots to `folder` and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    result = scores(run_sweep(config))
    write_csv(result, folder / "sim.csv")
    print_table(result, console)
    if config.plots:
        _plot([score.row for score in result], folder)
    return result


def write_csv(rows: Iterable[Score], path: Path) -> None:
    """One line a cell; an empty field is a number that does not apply."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [*_ROW_COLUMNS, *_RESULT_COLUMNS, *_SHARE_COLUMNS, *(f"cost_{term}" for term in COST_TERMS), *_DECILES]
        )
        for score in rows:
            result = score.row.result
            writer.writerow(
                [
                    *(getattr(score.row, name) for name in _ROW_COLUMNS),
                    *(getattr(result, name) for name in _RESULT_COLUMNS),
                    *(getattr(score, name) for name in _SHARE_COLUMNS),
                    *(getattr(result.cost, term) for term in COST_TERMS),
                    *result.wait_p99_by_decile_s,
                ]
            )


def print_table(rows: Sequence[Score], console: Console | None = None) -> None:
    """One line for each workload, load and policy: means over seeds (with the spread of steps/min)."""
    console = table_console(console, _TABLE_WIDTH)
    table = Table(title="thunder-rollout simulate")
    headers = ("workload", "load", "programs", "policy", "steps/min", "of bound", "of seer", "KV hits", "of inf.")
    waits = ("latency p50 s", "p95 s", "wait p99 s", "imbalance")
    for name in (*headers, *waits, *COST_TERMS):
        table.add_column(name, justify="left" if name in ("workload", "policy") else "right")
    for (workload, load), cells in groupby(rows, key=lambda score: (score.row.workload, score.row.load)):
        by_policy: dict[str, list[Score]] = {}
        for score in cells:
            by_policy.setdefault(score.row.policy, []).append(score)
        for policy, same in by_policy.items():
            table.add_row(workload, f"{load:g}", str(same[0].row.num_programs), policy, *_numbers(same))
        table.add_section()
    console.print(table)


def _numbers(same: Sequence[Score]) -> list[str]:
    def mean(name: str, digits: int) -> str:
        return f"{statistics.fmean(getattr(score.row.result, name) for score in same):.{digits}f}"

    def share(name: str) -> str:
        values = [value for score in same if (value := getattr(score, name)) is not None]
        return f"{statistics.fmean(values):.2f}" if values else "-"

    steps = [score.row.result.steps_per_min for score in same]
    spread = f" ±{statistics.stdev(steps):.0f}" if len(steps) > 1 else ""
    cost = [statistics.fmean(getattr(score.row.result.cost, term) for score in same) for term in COST_TERMS]
    return [
        f"{statistics.fmean(steps):.0f}{spread}",
        share("bound_share"),
        share("clairvoyant_share"),
        mean("kv_hit_rate", 2),
        share("hit_share"),
        mean("turn_latency_p50_s", 2),
        mean("turn_latency_p95_s", 2),
        mean("wait_p99_s", 1),
        mean("imbalance", 2),
        *(f"{value:.2f}" for value in cost),
    ]


def _plot(rows: Sequence[Row], folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning(
            "no plots: matplotlib is not installed; install it (`pip install matplotlib`) or set plots=false"
        )
        return
    from thunder_rollout.sim.plots import draw_all

    for path in draw_all(rows, folder):
        logger.info("plot: %s", path)
