"""Belief and engine agree while four times more programs run than fit."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.support.failing_engines import SUPERVISED, supervised_run
from thunder_rollout.bench.cell import CellResult, run_cell
from thunder_rollout.bench.closed_loop import ClosedLoop
from thunder_rollout.bench.config import BenchConfig, CellsConfig, PlanConfig, WorkloadConfig
from thunder_rollout.bench.plan import planned_cells
from thunder_rollout.bench.workload import mean_context_tokens, random_positions
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.service import SchedulerService

CONFIG = replace(
    SUPERVISED,
    kv_cache_tokens=51_200,
    max_model_len=16_384,
    max_num_seqs=64,
    max_num_batched_tokens=1024,
)


async def watch(service: SchedulerService, drifts: list[float]) -> None:
    """After each report."""
    await asyncio.sleep(CONFIG.report_s / 2)
    while True:
        await asyncio.sleep(CONFIG.report_s)
        for backend in service.metrics().scheduler.backends:
            assert backend.drift_tokens is not None
            drifts.append(backend.drift_tokens / backend.capacity_tokens)


@pytest.mark.parametrize("kv_events", [True, False])
def test_a_row_tells_the_drift_of_its_window(kv_events: bool) -> None:
    config = replace(CONFIG, kv_events=kv_events)
    cells = CellsConfig(
        workload="short_tools", policies=["adaptive"], loads=[4.0], seeds=[0], warmup_s=10.0, measure_s=20.0
    )
    plan = PlanConfig(name="bench", cells=[cells])
    (cell,) = planned_cells(BenchConfig(engine=config, plan=plan, workload={"short_tools": WorkloadConfig()}))

    async def main() -> CellResult:
        start = random_positions(cell.workload, seed=0, num_slots=cell.num_programs)
        capacities = dict.fromkeys(("engine0", "engine1"), 51_200)
        async with supervised_run(make=lambda: FakeEngine(config), config=config) as run:
            scheduler = LocalScheduler(run.service)
            return await run_cell(cell, start, scheduler, run.hosts, capacities=capacities, vocab_size=500)

    row = run_in_virtual_time(main())
    assert (row.drift_p95 is not None) == kv_events
    assert not kv_events or 0 < row.drift_p95 < 0.02


@pytest.mark.parametrize("release_on_pause", [False, True])
def test_drift_is_under_2_percent_of_capacity_at_p95_when_overcommitted(release_on_pause: bool) -> None:
    config = replace(CONFIG, release_on_pause=release_on_pause)

    async def main() -> list[float]:
        drifts: list[float] = []
        workload = WorkloadConfig(name="short_tools")
        num_slots = round(4 * 2 * 51_200 / mean_context_tokens(workload))
        start = random_positions(workload, seed=0, num_slots=num_slots)
        async with supervised_run(make=lambda: FakeEngine(config), config=config) as run:
            loop = ClosedLoop(
                workload, start, LocalScheduler(run.service), run.hosts,
                name="drift", seed=0, vocab_size=500, block_size=CONFIG.block_size, send_hashes=True,
            )  # fmt: skip
            tasks = [*loop.begin(), asyncio.create_task(watch(run.service, drifts))]
            await asyncio.sleep(45.0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return sorted(drifts)

    drifts = run_in_virtual_time(main())
    assert len(drifts) > 80
    assert drifts[len(drifts) * 95 // 100] < 0.02
    assert drifts[len(drifts) // 2] < 0.005
    assert drifts[-1] > 0, "it is measured"
