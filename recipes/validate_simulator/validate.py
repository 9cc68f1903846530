"""Is the simulator right? Live runs of `thunder-rollout bench` beside the same cells in virtual time.

    python recipes/validate_simulator/validate.py --bench runs/bench/bench.json --profile runs/calibrate/mine.yaml

Each cell's simulated steps/min (mean over seeds) against the median of its live runs, and the order of the
policies wherever their live intervals don't overlap. `--warmup-s`, `--measure-s` are those of the bench.
Writes `runs/validate_simulator/table.md`; exits with 1 where something is off by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.sim.cells import Cell, run_cell
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.profiles import EngineProfile

NUM_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Compared:
    load: float
    policy: str
    live: tuple[float, ...]
    simulated: float

    @property
    def median(self) -> float:
        return statistics.median(self.live)

    @property
    def ratio(self) -> float:
        return self.simulated / self.median


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, default=Path("runs/bench/bench.json"))
    parser.add_argument("--profile", type=Path, help="default: conf/sim_engine/cpu_tiny.yaml")
    parser.add_argument("--warmup-s", type=float, default=20.0)
    parser.add_argument("--measure-s", type=float, default=30.0)
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--out", type=Path, default=Path("runs/validate_simulator/table.md"))
    args = parser.parse_args()
    config = to_typed(SimulateConfig, compose_config("simulate", ["workloads=[short_tools]"]))
    config = replace(config, warmup_s=args.warmup_s, measure_s=args.measure_s, seeds=list(range(NUM_SEEDS)))
    if args.profile is not None:
        config = replace(config, sim_engine=EngineProfile(**yaml.safe_load(args.profile.read_text())))
    compared = compare(json.loads(args.bench.read_text()), config)
    wrong = wrong_order(compared)
    text = table(compared, wrong, args.tolerance)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    return int(bool(wrong) or any(abs(cell.ratio - 1) > args.tolerance for cell in compared))


def compare(rows: Sequence[Mapping[str, Any]], config: SimulateConfig) -> list[Compared]:
    live: dict[tuple[float, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        live[row["load"], row["policy"]].append(row)
    return [
        Compared(load, policy, tuple(row["steps_per_min"] for row in same), simulated(config, load, policy, same[0]))
        for (load, policy), same in sorted(live.items())
    ]


def simulated(config: SimulateConfig, load: float, policy: str, row: Mapping[str, Any]) -> float:
    cells = [
        Cell(
            config=config,
            workload="short_tools",
            policy=policy,
            load=load,
            seed=seed,
            max_programs=row.get("max_programs"),
        )
        for seed in config.seeds
    ]
    return statistics.fmean(run_cell(cell).result.steps_per_min for cell in cells)


def wrong_order(compared: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """Pairs of one load whose live intervals don't overlap and that the simulator orders the other way."""
    return [
        (slower, faster)
        for slower in compared
        for faster in compared
        if slower.load == faster.load and max(slower.live) < min(faster.live) and slower.simulated >= faster.simulated
    ]


def table(compared: Sequence[Compared], wrong: Sequence[tuple[Compared, Compared]], tolerance: float) -> str:
    lines = ["| load | policy | live median (least to most) | simulated | ratio |", "|---|---|---|---|---|"]
    for cell in compared:
        mark = "" if abs(cell.ratio - 1) <= tolerance else " (!)"
        lines.append(
            f"| {cell.load:g} | {cell.policy} | {cell.median:.0f} ({min(cell.live):.0f} to {max(cell.live):.0f}) "
            f"| {cell.simulated:.0f} | {cell.ratio:.2f}{mark} |"
        )
    lines.append("")
    lines += [f"- order at load {a.load:g}: {a.policy} < {b.policy} live, not simulated" for a, b in wrong]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
