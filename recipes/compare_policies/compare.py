"""`adaptive` against every other policy and the bounds, from the sim.csv files of `thunder-rollout simulate`.

    python recipes/compare_policies/compare.py runs/compare_policies/*/sim.csv

A cell is one workload at one load. Ratios to the best other policy and to the best peak are of means over
seeds; margins over `thunder` are paired by seed, with 95% intervals of Student's t over seeds. Writes
`table.md`; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.bench.intervals import Interval, interval
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.bounds import CLAIRVOYANT, INFINITE_KV

OURS = "adaptive"
PAPER = "thunder"
SHORT_TOOLS = ("short_tools", "mini_swe_agent", "openhands", "grpo_groups", "mixed_sizes")  # medians of seconds
LEAST_OF_BEST = 0.97
LEAST_OF_PEAK = 0.9
LEAST_HITS = 0.95
PEAK_LOAD = 4.0

Samples = Mapping[tuple[str, float, str], Mapping[int, Mapping[str, str]]]  # workload, load, policy -> seed -> row


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell; None where the bound was not run."""

    workload: str
    load: float
    steps_per_min: float  # of `adaptive`
    best_other: str
    of_best: float
    over_thunder: Interval | None
    of_bound: float | None
    of_clairvoyant: float | None
    of_peak: float
    of_infinite_hits: float | None

    @property
    def missed(self) -> list[str]:
        found = []
        if self.of_best < LEAST_OF_BEST:
            found.append(f"{self.of_best:.2f} of {self.best_other}")
        if self.load == PEAK_LOAD and self.of_peak < LEAST_OF_PEAK:
            found.append(f"{self.of_peak:.2f} of the best peak")
        if self.workload in SHORT_TOOLS and self.of_infinite_hits is not None and self.of_infinite_hits < LEAST_HITS:
            found.append(f"hits {self.of_infinite_hits:.2f} of infinite KV")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_policies/table.md"))
    args = parser.parse_args()
    samples = read(args.files)
    cells = compare(samples)
    text = table(cells, margins(samples))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    return int(any(cell.missed for cell in cells))


def read(files: Sequence[Path]) -> Samples:
    samples: dict[tuple[str, float, str], dict[int, Mapping[str, str]]] = {}
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = (row["workload"], float(row["load"]), row["policy"])
                if int(row["seed"]) in samples.setdefault(key, {}):
                    raise ConfigError(f"{path}: {key} with seed {row['seed']} was read before; give each cell once")
                samples[key][int(row["seed"])] = row
    return samples


def compare(samples: Samples) -> list[Compared]:
    """Raises `ConfigError` where a cell lacks `adaptive` or every other policy."""
    cells = dict.fromkeys((workload, load) for workload, load, _ in samples)
    return [_compared(samples, workload, load) for workload, load in cells]


def margins(samples: Samples) -> dict[str, Interval]:
    """By workload: `adaptive` over `thunder`, the geometric mean over loads of each seed."""
    found = {}
    for workload in dict.fromkeys(name for name, _, _ in samples):
        loads = [load for name, load, policy in samples if (name, policy) == (workload, OURS)]
        ratios = [_paired(samples, workload, load) for load in loads]
        seeds = set.intersection(*(set(ratio) for ratio in ratios))
        if seeds:
            found[workload] = interval(
                [statistics.geometric_mean(ratio[seed] for ratio in ratios) for seed in sorted(seeds)]
            )
    return found


def table(cells: Sequence[Compared], over_thunder: Mapping[str, Interval]) -> str:
    headers = ("workload", "load", "steps/min", "of the best other", f"over `{PAPER}`", "of the bound")
    lines = [_line(*headers, "of clairvoyant", "hits / infinite KV"), "|---" * 8 + "|"]
    lines += [
        _line(
            f"`{cell.workload}`",
            f"{cell.load:g}",
            f"{cell.steps_per_min:.0f}",
            f"{cell.of_best:.2f} {cell.best_other}",
            "-" if cell.over_thunder is None else str(cell.over_thunder),
            _share(cell.of_bound),
            _share(cell.of_clairvoyant),
            _share(cell.of_infinite_hits),
        )
        for cell in cells
    ]
    summary = ("workload", f"over `{PAPER}`, all loads", "least of the best other", "at load 4 of the best peak")
    lines += ["", _line(*summary), "|---" * 4 + "|"]
    for workload, margin in over_thunder.items():
        same = [cell for cell in cells if cell.workload == workload]
        peak = next((cell.of_peak for cell in same if cell.load == PEAK_LOAD), None)
        least = min(cell.of_best for cell in same)
        lines.append(_line(f"`{workload}`", str(margin), f"{least:.2f}", _share(peak)))
    lines.append("")
    lines += [f"- missed: {cell.workload} at {cell.load:g}: {', '.join(cell.missed)}" for cell in cells if cell.missed]
    return "\n".join(lines) + "\n"


def _compared(samples: Samples, workload: str, load: float) -> Compared:
    steps = {
        policy: _mean(rows, "steps_per_min")
        for (name, at, policy), rows in samples.items()
        if (name, at) == (workload, load)
    }
    others = {policy: value for policy, value in steps.items() if policy not in (OURS, INFINITE_KV, CLAIRVOYANT)}
    if OURS not in steps or not others:
        raise ConfigError(f"{workload} at load {load:g}: needs {OURS} and at least one other policy, has {list(steps)}")
    best_other = max(others, key=lambda policy: others[policy])
    peak = max(
        _mean(rows, "steps_per_min")
        for (name, _, policy), rows in samples.items()
        if name == workload and policy not in (INFINITE_KV, CLAIRVOYANT)
    )
    ours = samples[workload, load, OURS]
    paired = list(_paired(samples, workload, load).values())
    return Compared(
        workload=workload,
        load=load,
        steps_per_min=steps[OURS],
        best_other=best_other,
        of_best=steps[OURS] / others[best_other],
        over_thunder=interval(paired) if paired else None,
        of_bound=_mean_share(ours, "bound_share"),
        of_clairvoyant=_mean_share(ours, "clairvoyant_share"),
        of_peak=steps[OURS] / peak,
        of_infinite_hits=_mean_share(ours, "hit_share"),
    )


def _paired(samples: Samples, workload: str, load: float) -> dict[int, float]:
    """`adaptive` over `thunder`, by seed."""
    ours, papers = samples[workload, load, OURS], samples.get((workload, load, PAPER), {})
    return {
        seed: float(row["steps_per_min"]) / float(papers[seed]["steps_per_min"])
        for seed, row in ours.items()
        if seed in papers
    }


def _mean(rows: Mapping[int, Mapping[str, str]], column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows.values())


def _line(*fields: str) -> str:
    return "| " + " | ".join(fields) + " |"


def _mean_share(rows: Mapping[int, Mapping[str, str]], column: str) -> float | None:
    """None where no row has the bound."""
    values = [float(row[column]) for row in rows.values() if row[column]]
    return statistics.fmean(values) if values else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
