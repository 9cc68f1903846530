"""Every cell of `thunder-rollout simulate`, in parallel, with progress."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thunder_rollout.sim.cells import TRACE, Cell, Row, make, num_fitting, run_cell
from thunder_rollout.sim.config import SimulateConfig

CAPPED = "capped"


def run_sweep(config: SimulateConfig) -> list[Row]:
    """The rows in the order of `cells`, whatever ended first. `capped` is tuned before the rest, on
    the first seed, for each workload and load."""
    with _Runner(config.num_processes) as runner:
        caps = _tune(config, runner) if CAPPED in config.policies else {}
        return runner.run("simulating", list(cells(config, caps)))


def cells(config: SimulateConfig, caps: dict[tuple[str, float], int]) -> Iterator[Cell]:
    policies = [*config.policies, *config.bounds]
    for workload in workload_names(config):
        for load in config.loads:
            for seed in config.seeds:
                for policy in policies:
                    cap = caps[workload, load] if policy == CAPPED else None
                    yield Cell(config=config, workload=workload, policy=policy, load=load, seed=seed, max_programs=cap)


def workload_names(config: SimulateConfig) -> list[str]:
    return [*config.workloads, *([TRACE] if config.trace else [])]


def _tune(config: SimulateConfig, runner: _Runner) -> dict[tuple[str, float], int]:
    tries = []
    for name in workload_names(config):
        fitting = num_fitting(config, make(config, name))
        caps = sorted({max(1, round(share * fitting)) for share in config.cap_shares})
        for load in config.loads:
            tries += [
                Cell(config=config, workload=name, policy=CAPPED, load=load, seed=config.seeds[0], max_programs=cap)
                for cap in caps
            ]
    best: dict[tuple[str, float], Row] = {}
    for row in runner.run("tuning capped", tries):
        key = (row.workload, row.load)
        if key not in best or row.result.steps_per_min > best[key].result.steps_per_min:
            best[key] = row
    return {key: row.max_programs for key, row in best.items() if row.max_programs is not None}


class _Runner:
    """Processes started afresh (no state of ours is inherited), or none where one is enough."""

    def __init__(self, num_processes: int | None) -> None:
        count = num_processes or os.cpu_count() or 1
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context) if count > 1 else None

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, tasks: Sequence[Cell]) -> list[Row]:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            bar = progress.add_task(title, total=len(tasks))
            rows: dict[int, Row] = {}
            for index, row in self._results(tasks):
                rows[index] = row
                progress.advance(bar)
        return [rows[index] for index in range(len(tasks))]

    def _results(self, tasks: Sequence[Cell]) -> Iterator[tuple[int, Row]]:
        if self._pool is None:
            for index, cell in enumerate(tasks):
                yield index, run_cell(cell)
            return
        futures = {self._pool.submit(run_cell, cell): index for index, cell in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
