"""`thunder-rollout bench`: policies against each other on real engines, in one run that can be stopped.

Every cell begins with empty caches, a fresh scheduler actor and the positions of its rehearsal.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import ray

from thunder_rollout.bench.cell import CellResult, run_cell
from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.fleet import FleetHolder, scheduler_for
from thunder_rollout.bench.plan import CellPlan, planned_cells, whole_plan
from thunder_rollout.bench.prefill_cost import PrefillCosts
from thunder_rollout.bench.rehearsal import rehearse
from thunder_rollout.bench.runner import run_cells
from thunder_rollout.bench.store import RowStore
from thunder_rollout.engine.weights import FolderWeights
from thunder_rollout.errors import EngineDied, InfrastructureFailure
from thunder_rollout.runtime.cluster import start_ray
from thunder_rollout.runtime.weights import update_weights

GRACE_S = 120.0  # beyond its windows, after which a cell has failed


class CellHung(InfrastructureFailure):
    kind = "cell_hung"


async def run_bench(config: BenchConfig, folder: Path) -> list[CellPlan]:
    """Measure the cells that bench.json in `folder` lacks; returns those that failed."""
    plans = planned_cells(config)
    start_ray(config.ray)
    try:
        with tempfile.TemporaryDirectory(prefix="thunder-bench-") as scratch:
            measurer = _LiveMeasurer(FleetHolder(Path(scratch)), folder, config.rehearsal_lives)
            return await run_cells(plans, RowStore(folder, whole_plan(config)), measurer)
    finally:
        ray.shutdown()


class _LiveMeasurer:
    def __init__(self, holder: FleetHolder, folder: Path, rehearsal_lives: float) -> None:
        self._holder = holder
        self._prefill_costs = PrefillCosts(folder)
        self._rehearsal_lives = rehearsal_lives

    async def release(self) -> None:
        await self._holder.release()

    async def measure(self, plan: CellPlan) -> CellResult:
        fleet = await self._holder.fleet_for(plan)
        await self._prefill_costs.measure(plan, fleet.engines, vocab_size=fleet.vocab_size)
        start = await asyncio.to_thread(rehearse, plan, lives=self._rehearsal_lives)
        async with scheduler_for(plan, fleet) as (scheduler, supervisors):
            watching = [asyncio.create_task(supervisor.run()) for supervisor in supervisors]
            try:
                async with asyncio.timeout(plan.warmup_s + plan.measure_s + GRACE_S):
                    row = await run_cell(
                        plan,
                        start,
                        scheduler,
                        fleet.engines,
                        capacities=fleet.capacities,
                        vocab_size=fleet.vocab_size,
                        update_weights=lambda version: update_weights(
                            scheduler, fleet.engines, FolderWeights(path=str(fleet.folder)), version=version
                        ),
                    )
                    await fleet.reset()  # one whose core hangs does not answer, and its row counts for nothing
                if any(watcher.done() for watcher in watching) or any(one.num_restarts for one in supervisors):
                    raise EngineDied("an engine died while the cell was measured")
                return row
            except TimeoutError:
                raise CellHung(f"no end {GRACE_S:.0f} s after its windows") from None
            finally:
                for watcher in watching:
                    watcher.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
