"""One cell of a sweep, and its row in the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thunder_rollout.core.cost import CostShares
from thunder_rollout.sim.bounds import CLAIRVOYANT, INFINITE_KV, clairvoyant, closed_loop_steps_per_min, infinite_kv
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.measure import SimResult
from thunder_rollout.sim.replay import load_replay
from thunder_rollout.sim.simulator import Setup, Simulation, Window
from thunder_rollout.sim.workloads import Workload, make_workload

TRACE = "trace"
_SAMPLE_LIVES = 100  # programs whose mean number of turns sets the window


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`policy` may also be a bound's name; `max_programs` is the limit of `capped`."""

    config: SimulateConfig
    workload: str
    policy: str
    load: float
    seed: int
    max_programs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`closed_loop_steps_per_min` is the cell's second bound; `took_s` the real seconds it took."""

    workload: str
    engine: str
    policy: str
    load: float
    seed: int
    num_backends: int
    num_programs: int
    max_programs: int | None
    closed_loop_steps_per_min: float
    took_s: float
    result: SimResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A row beside its bounds. `bound_share` is of the lower of infinite KV and the closed loop;
    None where the bounds were not run."""

    row: Row
    bound_share: float | None
    hit_share: float | None
    clairvoyant_share: float | None


def make(config: SimulateConfig, name: str) -> Workload:
    if name == TRACE and config.trace is not None:
        return load_replay(Path(config.trace))
    return make_workload(name)


def num_fitting(config: SimulateConfig, workload: Workload) -> float:
    """Programs whose mean contexts fill the KV of all backends."""
    return config.num_backends * config.sim_engine.shape.capacity_tokens / workload.mean_context_tokens()


def setup_of(cell: Cell, workload: Workload) -> Setup:
    config = cell.config
    num_slots = max(1, round(cell.load * num_fitting(config, workload)))
    scheduler = config.scheduler
    if cell.policy not in (INFINITE_KV, CLAIRVOYANT):
        scheduler = replace(scheduler, policy=cell.policy)
    if cell.max_programs is not None:
        scheduler = replace(scheduler, capped=replace(scheduler.capped, max_programs=cell.max_programs))
    return Setup(
        workload=workload,
        profile=config.sim_engine,
        scheduler=scheduler,
        window=_window(config, workload, num_slots),
        num_backends=config.num_backends,
        num_slots=num_slots,
        seed=cell.seed,
    )


def run_cell(cell: Cell) -> Row:
    started = time.perf_counter()
    workload = make(cell.config, cell.workload)
    setup = setup_of(cell, workload)
    if cell.policy == INFINITE_KV:
        result = infinite_kv(setup)
    elif cell.policy == CLAIRVOYANT:
        result = clairvoyant(setup)
    else:
        result = Simulation(setup).run()
    return Row(
        workload=cell.workload,
        engine=cell.config.sim_engine.name,
        policy=cell.policy,
        load=cell.load,
        seed=cell.seed,
        num_backends=setup.num_backends,
        num_programs=setup.num_slots,
        max_programs=cell.max_programs,
        closed_loop_steps_per_min=closed_loop_steps_per_min(
            workload, setup.profile, num_programs=setup.num_slots, seed=cell.seed
        ),
        took_s=time.perf_counter() - started,
        result=result,
    )


def scores(rows: Sequence[Row]) -> list[Score]:
    """Every policy's row with its shares, in the order given; the bounds' own rows are left in."""
    bounds = {(row.workload, row.load, row.seed, row.policy): row.result for row in rows}

    def score(row: Row) -> Score:
        roomy = bounds.get((row.workload, row.load, row.seed, INFINITE_KV))
        seer = bounds.get((row.workload, row.load, row.seed, CLAIRVOYANT))
        bound = None if roomy is None else min(roomy.steps_per_min, row.closed_loop_steps_per_min)
        return Score(
            row=row,
            bound_share=None if not bound else row.result.steps_per_min / bound,
            hit_share=None if roomy is None or not roomy.kv_hit_rate else row.result.kv_hit_rate / roomy.kv_hit_rate,
            clairvoyant_share=None if seer is None else row.result.steps_per_min / seer.steps_per_min,
        )

    return [score(row) for row in rows]


def mean_cost(rows: Sequence[Row]) -> CostShares:
    def mean(term: str) -> float:
        return statistics.fmean(getattr(row.result.cost, term) for row in rows)

    return CostShares(
        decode=mean("decode"),
        prefill=mean("prefill"),
        recompute=mean("recompute"),
        unused=mean("unused"),
        caching=mean("caching"),
    )


def _window(config: SimulateConfig, workload: Workload, num_slots: int) -> Window:
    if config.makespan_programs is not None:
        return Window(num_programs=config.makespan_programs)
    if config.measure_s is not None:
        return Window(warmup_s=config.warmup_s, measure_s=config.measure_s)
    turns = statistics.fmean(len(workload.script(index, 0).turns) for index in range(_SAMPLE_LIVES))
    return Window(
        warmup_turns=round(config.warmup_lives * turns * num_slots),
        measure_turns=max(1, round(config.measure_lives * turns * num_slots)),
    )
