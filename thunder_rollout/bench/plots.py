"""The plots of a run of the bench; shades and bars are 95% intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from thunder_rollout.bench.intervals import Interval

if TYPE_CHECKING:
    from thunder_rollout.bench.report import Summary

TERMS = ("decode", "prefill", "recompute", "unused", "caching")


def draw_all(found: Sequence[Summary], folder: Path) -> None:
    """Writes `<workload>-<model>-{load,cost}.png` for each workload and model, and ratios.png."""
    for (model, workload), group in groupby(found, key=lambda s: (s.first.model, s.first.workload)):
        same = list(group)
        _against_load(same, f"{workload}, {model}", folder / f"{workload}-{model}-load.png")
        _costs(same, f"{workload}, {model}", folder / f"{workload}-{model}-cost.png")
    _ratios(found, folder / "ratios.png")


def _against_load(same: Sequence[Summary], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    _lines(left, same, lambda summary: summary.steps_per_min)
    _lines(right, same, lambda summary: summary.kv_hit_rate)
    left.set(title=f"{title}: throughput", ylabel="steps/min", ylim=(0, None))
    right.set(title="KV hit rate", ylabel="share of prompt tokens", ylim=(0, 1))
    loads = sorted({summary.first.load for summary in same})
    for axes in (left, right):
        axes.set(xlabel="load (mean contexts / KV capacity)", xscale="log")
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.minorticks_off()
    left.legend(fontsize="small")
    _save(figure, path)


def _lines(axes: Axes, same: Sequence[Summary], value: Callable[[Summary], Interval]) -> None:
    for policy in dict.fromkeys(summary.first.policy for summary in same):
        own = [summary for summary in same if summary.first.policy == policy]
        axes.errorbar(
            [summary.first.load for summary in own],
            [value(summary).mean for summary in own],
            yerr=[_half_width(value(summary)) for summary in own],
            marker=".",
            capsize=3,
            label=policy,
        )


def _costs(same: Sequence[Summary], title: str, path: Path) -> None:
    """The five terms as shares of capacity x time, stacked, by load and policy."""
    loads = sorted({summary.first.load for summary in same})
    figure, all_axes = plt.subplots(1, len(loads), figsize=(3 * len(loads) + 2, 4.5), sharey=True, squeeze=False)
    for axes, load in zip(all_axes[0], loads, strict=True):
        own = [summary for summary in same if summary.first.load == load]
        bottom = [0.0] * len(own)
        for term in TERMS:
            heights = [summary.cost(term) for summary in own]
            axes.bar([summary.first.policy for summary in own], heights, bottom=bottom, label=term)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_title(f"{title}, load {load:g}", fontsize="small")
        axes.tick_params(axis="x", rotation=90)
    all_axes[0][0].set_ylabel("share of KV token-seconds")
    all_axes[0][-1].legend(fontsize="small")
    _save(figure, path)


def _ratios(found: Sequence[Summary], path: Path) -> None:
    """`adaptive` over each other policy, a row for each workload, model and load."""
    own = [summary for summary in found if summary.over is not None]
    if not own:
        return
    places = list(dict.fromkeys(_place(summary) for summary in own))
    policies = list(dict.fromkeys(summary.first.policy for summary in own))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(places)))
    for number, policy in enumerate(policies):
        same = [summary for summary in own if summary.first.policy == policy]
        ratios = [summary.over for summary in same if summary.over is not None]
        shift = 0.6 * ((number + 0.5) / len(policies) - 0.5)
        axes.errorbar(
            [ratio.mean for ratio in ratios],
            [places.index(_place(summary)) + shift for summary in same],
            xerr=[_half_width(ratio) for ratio in ratios],
            fmt="o",
            markersize=4,
            capsize=2,
            label=policy,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.set(xlabel="steps/min of adaptive over the policy's", title="adaptive against the others")
    axes.legend(fontsize="small")
    _save(figure, path)


def _place(summary: Summary) -> str:
    return f"{summary.first.workload}, {summary.first.model}, load {summary.first.load:g}"


def _half_width(value: Interval) -> float:
    return 0.0 if math.isnan(value.half_width) else value.half_width


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
