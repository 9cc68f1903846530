"""Is the simulator right? Live runs of `thunder-rollout bench` beside the same cells in virtual time.

    python recipes/validate_simulator/validate.py --bench runs/bench/bench.json --profile runs/calibrate/mine.yaml

Each cell of the small model on short tools: its simulated steps/min (mean over seeds) against the median of its
live runs, and the order of the policies wherever their live intervals don't overlap. Writes
`runs/validate_simulator/table.md`; exits with 1 where something is off by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.live_fit import LiveCell, read_bench, simulated
from thunder_rollout.sim.profiles import read_profile

NUM_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Compared:
    cell: LiveCell
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.cell.median


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, default=Path("runs/bench/bench.json"))
    parser.add_argument("--profile", type=Path, help="default: conf/sim_engine/cpu_tiny.yaml")
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--out", type=Path, default=Path("runs/validate_simulator/table.md"))
    args = parser.parse_args()
    config = to_typed(SimulateConfig, compose_config("simulate", ["workloads=[short_tools]"]))
    config = replace(config, seeds=list(range(NUM_SEEDS)))
    if args.profile is not None:
        config = replace(config, sim_engine=read_profile(args.profile))
    compared = [Compared(cell, simulated(cell, config)) for cell in read_bench(args.bench)]
    wrong = wrong_order(compared)
    text = table(compared, wrong, args.tolerance)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    return int(bool(wrong) or any(abs(one.ratio - 1) > args.tolerance for one in compared))


def wrong_order(compared: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """Pairs of one load whose live intervals don't overlap and that the simulator orders the other way."""
    return [
        (slower, faster)
        for slower in compared
        for faster in compared
        if slower.cell.load == faster.cell.load
        and min(len(slower.cell.steps_per_min), len(faster.cell.steps_per_min)) > 1
        and max(slower.cell.steps_per_min) < min(faster.cell.steps_per_min)
        and slower.simulated >= faster.simulated
    ]


def table(compared: Sequence[Compared], wrong: Sequence[tuple[Compared, Compared]], tolerance: float) -> str:
    lines = ["| load | policy | live median (least to most) | simulated | ratio |", "|---|---|---|---|---|"]
    for one in compared:
        mark = "" if abs(one.ratio - 1) <= tolerance else " (!)"
        steps = one.cell.steps_per_min
        lines.append(
            f"| {one.cell.load:g} | {one.cell.policy} | {one.cell.median:.0f} ({min(steps):.0f} to {max(steps):.0f}) "
            f"| {one.simulated:.0f} | {one.ratio:.2f}{mark} |"
        )
    lines.append("")
    lines += [
        f"- order at load {slower.cell.load:g}: {slower.cell.policy} < {faster.cell.policy} live, not simulated"
        for slower, faster in wrong
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
