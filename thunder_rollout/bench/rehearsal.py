"""Where the programs of a cell are in its steady state: played in virtual time, on engines without a model.

At four times the KV's load a life lasts minutes, and who is how old and who waits differs by policy: one that
serves in order of arrival has its queue full of programs that never began, one that admits everybody has all
ages everywhere. To let that come about on the live engines would cost a life of each cell; here it costs
seconds of one core, the same for every policy. Only positions are taken over, no speeds.

Tried in virtual time on short tools at load 4 (`sticky`, `capped`, `thunder`, `adaptive`): 18 s after 12 s of warm-up
do 1.02 to 1.06 times the steps of two minutes long after; from random ages 1.00, 0.71, 1.17 and 0.65 times.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from thunder_rollout.bench.cell import sleep_or_raise
from thunder_rollout.bench.closed_loop import ClosedLoop
from thunder_rollout.bench.plan import CellPlan
from thunder_rollout.bench.workload import Position, random_positions
from thunder_rollout.core.events import BackendUp
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.model import EngineTiming
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.service import SchedulerService

VOCAB_SIZE = 4096
_POLL_S = 1.0
# Of the order of what was measured on one of two busy cores (conf/sim_engine/cpu_tiny.yaml, prefill_cost.json); a model
# that is not here takes the first's.
_TIMINGS = {
    "qwen2_3m": EngineTiming(
        step_s=8e-3, prefill_token_s=4e-5, decode_turn_s=4e-4, context_token_s=5e-7, prefill_context_s=6e-8
    ),
    "qwen2_26m": EngineTiming(
        step_s=2e-2, prefill_token_s=6e-4, decode_turn_s=3e-3, context_token_s=5e-7, prefill_context_s=1e-7
    ),
}


def rehearse(plan: CellPlan, *, lives: float) -> list[Position]:
    """Positions after `lives` x `plan.num_programs` programs have ended, in the order in which they ask."""
    start = random_positions(plan.workload, seed=plan.key.seed, num_slots=plan.num_programs)
    num_programs = round(lives * plan.num_programs)
    return run_in_virtual_time(_play(plan, start, num_programs)) if num_programs else start


async def _play(plan: CellPlan, start: list[Position], num_programs: int) -> list[Position]:
    async with stage(plan) as (scheduler, engines):
        loop = ClosedLoop(
            plan.workload,
            start,
            scheduler,
            engines,
            name="rehearsal",
            seed=plan.key.seed,
            vocab_size=VOCAB_SIZE,
            block_size=plan.engines[0].block_size,
            send_hashes=plan.scheduler.uses_block_hashes,
        )
        tasks = loop.begin()
        try:
            while loop.num_ended < num_programs:
                await sleep_or_raise(_POLL_S, tasks)
            return loop.positions()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def stage(plan: CellPlan) -> AsyncIterator[tuple[LocalScheduler, dict[str, FakeEngine]]]:
    """The cell's scheduler and engines without a model, in this process and the event loop's time."""
    timing = _TIMINGS.get(plan.key.model, _TIMINGS["qwen2_3m"])
    engines = {
        f"engine{number}": FakeEngine(config, timing=timing, vocab_size=VOCAB_SIZE)
        for number, config in enumerate(plan.engines)
    }
    service = SchedulerService(plan.scheduler, clock=asyncio.get_running_loop().time)
    await service.start()
    try:
        for name, engine in engines.items():
            info = await engine.start()
            service.handle(
                BackendUp(
                    backend=name,
                    generation=0,
                    capacity_tokens=info.capacity_tokens,
                    max_running=info.max_running,
                    block_size=info.block_size,
                    releases=info.releases,
                )
            )
        yield LocalScheduler(service), engines
    finally:
        await service.stop()
        for engine in engines.values():
            await engine.stop()
