"""The plots of a sweep, one file for each workload and question."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from thunder_rollout.sim.bounds import CLAIRVOYANT, INFINITE_KV
from thunder_rollout.sim.cells import Row, mean_cost

TERMS = ("decode", "prefill", "recompute", "unused", "caching")
BOUNDS = (INFINITE_KV, CLAIRVOYANT)
_COLUMNS = 4


def draw_all(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Writes `<workload>-<plot>.png`; yields each path."""
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        yield _against_load(own, folder / f"{workload}-load.png")
        yield _costs(own, folder / f"{workload}-cost.png")
        yield _usage(own, folder / f"{workload}-usage.png")
        yield _waits(own, folder / f"{workload}-waits.png")


def _against_load(rows: Sequence[Row], path: Path) -> Path:
    """Throughput and hits of every policy, the seeds' range shaded."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    _lines(left, rows, lambda row: row.result.steps_per_min)
    _lines(right, rows, lambda row: row.result.kv_hit_rate)
    left.set(title=f"{rows[0].workload}: throughput", ylabel="steps/min", ylim=(0, None))
    right.set(title="KV hit rate", ylabel="share of prompt tokens", ylim=(0, 1))
    for axes in (left, right):
        axes.set(xlabel="load (mean contexts / KV capacity)", xscale="log")
        loads = sorted({row.load for row in rows})
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
    left.legend(fontsize="small")
    return _save(figure, path)


def _lines(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        loads = sorted({row.load for row in rows if row.policy == policy})
        values = [[value(row) for row in rows if row.policy == policy and row.load == load] for load in loads]
        style = "--" if policy in BOUNDS else "-"
        (line,) = axes.plot(loads, [statistics.fmean(v) for v in values], style, marker=".", label=policy)
        axes.fill_between(loads, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())


def _costs(rows: Sequence[Row], path: Path) -> Path:
    """The five terms as shares of capacity x time, stacked, by load and policy."""
    loads = sorted({row.load for row in rows})
    policies = [p for p in dict.fromkeys(row.policy for row in rows) if p != INFINITE_KV]
    figure, all_axes = plt.subplots(1, len(loads), figsize=(3 * len(loads) + 1, 4.5), sharey=True, squeeze=False)
    for axes, load in zip(all_axes[0], loads, strict=True):
        bottom = [0.0] * len(policies)
        costs = [mean_cost([row for row in rows if row.policy == p and row.load == load]) for p in policies]
        for term in TERMS:
            heights = [getattr(cost, term) for cost in costs]
            axes.bar(policies, heights, bottom=bottom, label=term)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_title(f"load {load:g}")
        axes.tick_params(axis="x", rotation=90)
    all_axes[0][0].set_ylabel("share of KV token-seconds")
    all_axes[0][-1].legend(fontsize="small")
    return _save(figure, path)


def _usage(rows: Sequence[Row], path: Path) -> Path:
    """Share of each backend's KV that running turns hold, at the highest load, first seed."""
    top = max(row.load for row in rows)
    first = {row.policy: row for row in reversed(rows) if row.load == top and row.policy != INFINITE_KV}
    num_rows = -(-len(first) // _COLUMNS)
    figure, grid = plt.subplots(num_rows, _COLUMNS, figsize=(14, 2.6 * num_rows), sharey=True, squeeze=False)
    for axes, (policy, row) in zip(grid.flat, reversed(first.items()), strict=False):
        usage = row.result.usage
        for backend in range(len(usage.shares[0]) if usage.shares else 0):
            axes.plot(usage.times_s, [shares[backend] for shares in usage.shares], linewidth=0.8)
        axes.set(title=f"{policy}, load {top:g}", xlabel="s", ylim=(0, 1.05))
    return _save(figure, path)


def _waits(rows: Sequence[Row], path: Path) -> Path:
    """Distribution of the wait for admission, by load."""
    loads = sorted({row.load for row in rows})
    figure, all_axes = plt.subplots(1, len(loads), figsize=(3 * len(loads) + 1, 4), sharey=True, squeeze=False)
    for axes, load in zip(all_axes[0], loads, strict=True):
        for row in rows:
            if row.load == load and row.seed == rows[0].seed and row.policy != INFINITE_KV:
                waits = row.result.waits_s
                axes.plot([max(wait, 1e-3) for wait in waits], [i / 100 for i in range(len(waits))], label=row.policy)
        axes.set(title=f"load {load:g}", xlabel="wait, s", xscale="log")
    all_axes[0][0].set_ylabel("share of turns")
    all_axes[0][0].legend(fontsize="x-small")
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
