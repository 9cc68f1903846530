"""Measures the cells of a run one by one, each on disk before the next begins.

A cell that fails is tried once more on new engines; if it fails again the run goes on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from thunder_rollout.bench.cell import CellResult
from thunder_rollout.bench.plan import CellPlan
from thunder_rollout.bench.store import RowStore
from thunder_rollout.errors import ThunderError, UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 2
_CELL_EXTRA_S = 4.0  # of a cell beside its windows, for the estimate of what is left


class Measurer(Protocol):
    async def measure(self, plan: CellPlan) -> CellResult: ...

    async def release(self) -> None:
        """Give up the engines; the next cell gets new ones. Idempotent."""


async def run_cells(plans: Sequence[CellPlan], store: RowStore, measurer: Measurer) -> list[CellPlan]:
    """Measure those of `plans` that `store` lacks; returns the ones that failed."""
    todo = store.resume(plans)
    failed = []
    try:
        for number, plan in enumerate(todo, len(plans) - len(todo) + 1):
            row = await _measured(plan, measurer)
            if row is None:
                failed.append(plan)
                continue
            store.add(row)
            left_s = sum(later.warmup_s + later.measure_s + _CELL_EXTRA_S for later in todo[number - len(plans) :])
            logger.info(
                "%d/%d  %s, %s, load %g, %s, seed %d: %.0f steps/min, hits %.2f; about %.0f min left",
                number, len(plans), row.workload, row.model, row.load, row.policy, row.seed,
                row.steps_per_min, row.kv_hit_rate, left_s / 60 if number < len(plans) else 0.0,
            )  # fmt: skip
    finally:
        await measurer.release()
    return failed


async def _measured(plan: CellPlan, measurer: Measurer) -> CellResult | None:
    for _ in range(ATTEMPTS):
        try:
            return await measurer.measure(plan)
        except UserError:
            raise
        except ThunderError as error:
            logger.warning("%s failed, its engines are replaced: %s", plan.key, error)
            await measurer.release()
    return None
