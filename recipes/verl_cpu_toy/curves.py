"""Learning curves of the recipe's runs: curves.csv and curves.png out of verl's own metrics.

usage: python recipes/verl_cpu_toy/curves.py [runs/verl_cpu_toy] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

VALIDATION = "val-core/toy/acc/mean@1"
COLUMNS = {
    "validation_resolved": VALIDATION,
    "train_resolved": "critic/score/mean",
    "pearson": "training/rollout_actor_probs_pearson_corr",
    "entropy": "actor/entropy",
    "response_tokens": "response_length/mean",
    "turns": "num_turns/mean",
    "gen_s": "timing_s/gen",
    "update_s": "timing_s/update_actor",
    "step_s": "timing_s/step",
}


def read_run(folder: Path) -> list[dict[str, Any]]:
    """One row a step; empty where verl logged nothing under that name."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        data = record["data"]
        rows.append({"run": folder.name, "step": record["step"]} | {c: data.get(key, "") for c, key in COLUMNS.items()})
    return rows


def validations(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["validation_resolved"]) for row in rows if row["validation_resolved"] != ""]


def write_csv(runs: list[list[dict[str, Any]]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "step", *COLUMNS])
        writer.writeheader()
        for rows in runs:
            writer.writerows(rows)


def plot(runs: list[list[dict[str, Any]]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, rows in enumerate(runs):
        colour = f"C{number}"
        trained = [(row["step"], row["train_resolved"]) for row in rows if row["train_resolved"] != ""]
        axes.plot(*zip(*trained, strict=True), color=colour, alpha=0.25, linewidth=1)
        axes.plot(*zip(*validations(rows), strict=True), color=colour, marker="o", label=rows[0]["run"])
    axes.set(xlabel="step", ylabel="resolved", ylim=(0, 1), title="held-out tasks (bold), training batches (faint)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Learning curves of the recipe's runs.")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/verl_cpu_toy"))
    parser.add_argument("--out", type=Path, default=None, help="where the files go; the folder of the runs otherwise")
    options = parser.parse_args(arguments)
    folders = sorted(path.parent for path in options.runs.glob("*/metrics.jsonl"))
    if not folders:
        print(f"{options.runs}: no run with a metrics.jsonl; run run_verl_cpu_toy.sh first", file=sys.stderr)
        return 2
    runs = [rows for folder in folders if len(validations(rows := read_run(folder))) > 1]
    if not runs:
        print(f"{options.runs}: no run has come to its second validation yet; wait for it", file=sys.stderr)
        return 2
    out = options.out or options.runs
    write_csv(runs, out / "curves.csv")
    plot(runs, out / "curves.png")
    gains = []
    for rows in runs:
        (_, first), *_, (step, last) = validations(rows)
        gains.append(last - first)
        print(f"{rows[0]['run']}: {first:.3f} -> {last:.3f} ({last - first:+.3f}) after {step} steps")
    print(f"mean gain {mean(gains):+.3f}; written: {out / 'curves.csv'}, {out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
