"""A profile held against live runs of `thunder-rollout bench`.

`calibrate` drives engines alone; in a live run Ray, the driver and the scheduler take from the cores
that the engines compute on. Two factors stand for that, one on prefill and one on everything else:
those that bring the simulated steps/min of the `sticky` rows closest to the live medians (least
absolute log-ratio: near saturation a live cell may be far off, and must not bend the others). No
other policy's rows are looked at, so that they remain a test.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.cells import Cell, run_cell
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.profiles import EngineProfile
from thunder_rollout.sim.workloads import WORKLOADS

FITTED_POLICY = "sticky"
_Vector = npt.NDArray[np.float64]
_PREFILL_TERMS = ("prefill_token_s", "prefill_context_s")
_OTHER_TERMS = ("step_s", "decode_turn_s", "context_token_s", "turn_overhead_s")
_ROUNDS = 8
_DIFFERENCE = 0.1  # of the log-factors, for the slopes
_LONGEST_STEP = 0.7
_LEAST_MISS = 0.03  # a smaller one counts no less
_RIDGE = 0.02  # towards the step of no change, where the rows say little about a factor
_KEYS = {"workload", "model", "policy", "load", "num_programs", "steps_per_min"}


@dataclass(frozen=True, slots=True)
class LiveCell:
    """The repetitions (one a seed) of one cell of bench.json."""

    workload: str
    load: float
    policy: str
    steps_per_min: tuple[float, ...]
    num_programs: int
    max_programs: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.steps_per_min)


def read_bench(path: Path, model: str = "qwen2_3m") -> list[LiveCell]:
    """The cells of `model` on workloads that are simulated too. Raises `ConfigError` where there are none, and for
    a file that `thunder-rollout bench` of this version did not write."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"bench={path}: {error}; give the bench.json of `thunder-rollout bench`") from None
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if missing := _KEYS - row.keys():
            raise ConfigError(f"bench={path}: a row without {', '.join(sorted(missing))}; run the benchmark again")
        if row["workload"] in WORKLOADS and row["model"] == model:
            cells[row["workload"], row["load"], row["policy"]].append(row)
    if not cells:
        raise ConfigError(f"bench={path}: no row of {model} on a workload that is simulated too (short_tools)")
    return [
        LiveCell(
            workload=workload,
            load=load,
            policy=policy,
            steps_per_min=tuple(row["steps_per_min"] for row in same),
            num_programs=same[0]["num_programs"],
            max_programs=same[0].get("max_programs"),
        )
        for (workload, load, policy), same in sorted(cells.items())
    ]


def simulated(cell: LiveCell, config: SimulateConfig) -> float:
    """Its steps/min in virtual time, in the steady state as live: the mean over `config.seeds`, each for the lives
    that `config` says. Raises `ConfigError` where the engines simulated are not those of the live run."""
    same = [
        Cell(
            config=config,
            workload=cell.workload,
            policy=cell.policy,
            load=cell.load,
            seed=seed,
            max_programs=cell.max_programs,
        )
        for seed in config.seeds
    ]
    rows = [run_cell(one) for one in same]
    if rows[0].num_programs != cell.num_programs:
        raise ConfigError(
            f"bench: load {cell.load:g} had {cell.num_programs} programs, simulated are {rows[0].num_programs}; "
            "give num_engines and a profile of the same KV capacity, and the workload's defaults"
        )
    return statistics.fmean(row.result.steps_per_min for row in rows)


def scale_to_bench(cells: Sequence[LiveCell], config: SimulateConfig) -> EngineProfile:
    """`config.sim_engine` scaled by the two factors, by reweighted Gauss-Newton on their logarithms."""
    fitted = [cell for cell in cells if cell.policy == FITTED_POLICY]
    if len(fitted) < 2:
        raise ConfigError(f"bench: {len(fitted)} loads with rows of {FITTED_POLICY!r}; two are needed for two factors")

    def misses(factors: _Vector) -> _Vector:
        others, prefill = np.exp(factors)
        scaled = replace(config, sim_engine=scale(config.sim_engine, others, prefill))
        return np.array([math.log(simulated(cell, scaled) / cell.median) for cell in fitted])

    at = np.zeros(2)
    now = misses(at)
    best, error = at, float(np.abs(now).mean())
    for _ in range(_ROUNDS):
        slopes = np.column_stack([(misses(at + _DIFFERENCE * axis) - now) / _DIFFERENCE for axis in np.eye(2)])
        weighted = (slopes / np.maximum(np.abs(now), _LEAST_MISS)[:, None]).T
        step = np.linalg.solve(weighted @ slopes + _RIDGE * np.eye(2), -weighted @ now)
        at = at + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        now = misses(at)
        if np.abs(now).mean() < error:
            best, error = at, float(np.abs(now).mean())
    others, prefill = np.exp(best)
    profile = scale(config.sim_engine, others, prefill)
    source = (
        f"{profile.source}; scaled to {len(fitted)} live {FITTED_POLICY} cells: "
        f"prefill x {prefill:.2f}, the rest x {others:.2f}, mean error {error:.0%}"
    )
    return replace(profile, source=source)


def scale(profile: EngineProfile, others: float, prefill: float) -> EngineProfile:
    factors = dict.fromkeys(_PREFILL_TERMS, prefill) | dict.fromkeys(_OTHER_TERMS, others)
    scaled: dict[str, Any] = {name: float(getattr(profile, name) * factor) for name, factor in factors.items()}
    return replace(profile, **scaled)
