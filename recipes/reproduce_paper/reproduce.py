"""The ThunderAgent paper's throughput figures in shape (arXiv 2602.13692), from the simulator.

    python recipes/reproduce_paper/reproduce.py [--quick] [sim_engine=... seeds=[0,1] any field of conf/simulate.yaml]

Figure 4: one node, steps/min against the number of programs. Table 2: RL rollout on two nodes. Figure 6b:
`thunder` over dt and x. Writes `runs/reproduce_paper/`: table.md, rows.csv, figure4.png.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.sim.cells import Row
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.sweep import run_sweep

BASELINES = ("sticky", "ttl")  # request-level serving (vLLM, session affinity) and Continuum
TICKS_S = (1.0, 2.0, 5.0, 10.0, 20.0)
DECAY_BASES = (1.2, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Panel:
    name: str
    workload: str
    num_backends: int
    published: str  # thunder over request-level serving


PANELS = (
    Panel("figure 4, coding (mini-SWE-agent)", "mini_swe_agent", 1, "1.5 to 3.6"),
    Panel("figure 4, coding (OpenHands)", "openhands", 1, "1.5 to 3.6"),
    Panel("figure 4, routing (ToolOrchestra)", "tool_orchestration", 1, "1.24 (4f) to 3.6"),
    Panel("figure 4, scientific discovery", "science_agent", 1, "1.24 (4f) to 3.6"),
    Panel("table 2, mini-SWE-agent, two nodes", "mini_swe_agent", 2, "1.79 to 3.92"),
    Panel("table 2, OpenHands, two nodes", "openhands", 2, "1.79 to 3.92"),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a panel shows; ratios are of means over seeds."""

    panel: Panel
    best_ratio: float  # thunder over sticky, the largest of all loads
    best_load: float
    last_ratio: float  # at the highest load
    ttl_ratio: float
    kept: dict[str, float]  # steps/min at the highest load over the policy's own best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two loads and one panel, to see that it runs")
    parser.add_argument("--out", default="runs/reproduce_paper")
    args, overrides = parser.parse_known_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    defaults = ["sim_engine=h100x8_glm46_fp8", "bounds=[]", "plots=false", "warmup_lives=1", "measure_lives=2"]
    loads = "[1.0,4.0]" if args.quick else "[0.5,1.0,1.5,2.0,3.0,4.0]"
    config = to_typed(SimulateConfig, compose_config("simulate", [*defaults, f"loads={loads}", *overrides]))
    panels = PANELS[:1] if args.quick else PANELS

    rows: list[tuple[str, Row]] = []
    shapes = []
    for panel in panels:
        found = run_sweep(
            replace(
                config,
                workloads=[panel.workload],
                num_backends=panel.num_backends,
                policies=["thunder", *BASELINES, "adaptive"],
            )
        )
        rows += [(panel.name, row) for row in found]
        shapes.append(shape_of(panel, found))
    ablation = ablate(config, TICKS_S[1:3] if args.quick else TICKS_S, DECAY_BASES[:2] if args.quick else DECAY_BASES)

    write_rows(rows, out / "rows.csv")
    text = table(shapes, ablation)
    (out / "table.md").write_text(text)
    draw([(panel, [row for name, row in rows if name == panel.name]) for panel in panels], out / "figure4.png")
    print(text)


def means(rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """Steps/min by policy and load."""
    samples = defaultdict(list)
    for row in rows:
        samples[row.policy, row.load].append(row.result.steps_per_min)
    return {key: statistics.fmean(values) for key, values in samples.items()}


def shape_of(panel: Panel, rows: Sequence[Row]) -> Shape:
    steps = means(rows)
    loads = sorted({load for _, load in steps})
    ratios = {load: steps["thunder", load] / steps["sticky", load] for load in loads}
    best = max(ratios, key=lambda load: ratios[load])
    policies = {policy for policy, _ in steps}
    return Shape(
        panel=panel,
        best_ratio=ratios[best],
        best_load=best,
        last_ratio=ratios[loads[-1]],
        ttl_ratio=steps["thunder", loads[-1]] / steps["ttl", loads[-1]],
        kept={policy: steps[policy, loads[-1]] / max(steps[policy, load] for load in loads) for policy in policies},
    )


def ablate(config: SimulateConfig, ticks_s: Sequence[float], bases: Sequence[float]) -> dict[str, float]:
    """Steps/min of `thunder` on mini-SWE-agent at load 2, two nodes, by setting."""
    found = {}
    thunder = config.scheduler.thunder
    settings = {f"dt = {tick_s:g} s": replace(config.scheduler, tick_s=tick_s) for tick_s in ticks_s} | {
        f"x = {base:g}": replace(config.scheduler, thunder=replace(thunder, decay_base=base)) for base in bases
    }
    for name, scheduler in settings.items():
        cell = replace(config, scheduler=scheduler, workloads=["mini_swe_agent"], policies=["thunder"], loads=[2.0])
        found[name] = statistics.fmean(row.result.steps_per_min for row in run_sweep(replace(cell, num_backends=2)))
    return found


def table(shapes: Sequence[Shape], ablation: dict[str, float]) -> str:
    columns = ("panel", "thunder / sticky, most (load)", "at the highest load", "published", "thunder / ttl")
    keeps = [f"{policy} keeps" for policy in ("thunder", "sticky", "ttl", "adaptive")]
    lines = [f"| {' | '.join([*columns, *keeps])} |", "|---" * (len(columns) + len(keeps)) + "|"]
    for shape in shapes:
        kept = shape.kept
        lines.append(
            f"| {shape.panel.name} | {shape.best_ratio:.2f} ({shape.best_load:g}) | {shape.last_ratio:.2f} "
            f"| {shape.panel.published} | {shape.ttl_ratio:.2f} | {kept['thunder']:.2f} | {kept['sticky']:.2f} "
            f"| {kept['ttl']:.2f} | {kept['adaptive']:.2f} |"
        )
    best = max(ablation.values())
    lines += ["", "| figure 6b | steps/min | of the best |", "|---|---|---|"]
    lines += [f"| {name} | {steps:.0f} | {steps / best:.2f} |" for name, steps in ablation.items()]
    return "\n".join(lines) + "\n"


def write_rows(rows: Sequence[tuple[str, Row]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["panel", "policy", "load", "programs", "seed", "steps_per_min", "kv_hit_rate"])
        for name, row in rows:
            result = row.result
            writer.writerow(
                [name, row.policy, row.load, row.num_programs, row.seed, result.steps_per_min, result.kv_hit_rate]
            )


def draw(panels: Sequence[tuple[Panel, Sequence[Row]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(count, columns, figsize=(5 * columns, 3.5 * count), squeeze=False)
    for axis, (panel, rows) in zip(axes.flat, panels, strict=False):
        steps = means(rows)
        programs = {row.load: row.num_programs for row in rows}
        for policy in dict.fromkeys(row.policy for row in rows):
            loads = sorted(load for name, load in steps if name == policy)
            axis.plot([programs[load] for load in loads], [steps[policy, load] for load in loads], "o-", label=policy)
        axis.set_title(panel.name, fontsize=9)
        axis.set_xlabel("programs")
        axis.set_ylabel("steps/min")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
