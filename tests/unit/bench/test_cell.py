"""The benchmark's closed loop on engines without a model, in virtual time: the same every time."""

import asyncio

import pytest

from thunder_rollout.bench.cell import Cell, CellResult
from thunder_rollout.bench.config import WorkloadConfig
from thunder_rollout.bench.workload import mean_context_tokens, programs
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendDown, BackendUp
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.errors import EngineDied
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.service import SchedulerService

pytestmark = pytest.mark.slow

WORKLOAD = WorkloadConfig(prompt_tokens=300, observation_tokens=150, output_tokens=30, num_turns=8, tool_s=0.1)
ENGINE = EngineConfig(model="fake", kind="fake", kv_cache_tokens=16_384, max_model_len=8_192)


async def play(policy: str, load: float) -> CellResult:
    engines = {f"e{i}": FakeEngine(ENGINE) for i in range(2)}
    service = SchedulerService(SchedulerConfig(policy=policy, tick_s=1.0), clock=asyncio.get_running_loop().time)
    await service.start()
    capacity = 0
    for name, engine in engines.items():
        info = await engine.start()
        capacity += info.capacity_tokens
        service.handle(
            BackendUp(backend=name, generation=0, capacity_tokens=info.capacity_tokens, max_running=info.max_running)
        )
    cell = Cell(
        workload=WORKLOAD,
        policy=policy,
        load=load,
        seed=0,
        num_programs=round(load * capacity / mean_context_tokens(WORKLOAD)),
        vocab_size=1000,
        warmup_s=10.0,
        measure_s=20.0,
    )
    try:
        return await cell.run(LocalScheduler(service), engines, capacity_tokens=capacity, block_size=info.block_size)
    finally:
        await service.stop()
        for engine in engines.values():
            await engine.stop()


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, float], CellResult]:
    cells = [("sticky", 0.5), ("thunder", 0.5), ("sticky", 3.0), ("thunder", 3.0), ("cache_aware", 3.0)]
    return {cell: run_in_virtual_time(play(*cell)) for cell in cells}


def test_below_the_knee_thunder_is_sticky(results):
    sticky, thunder = results["sticky", 0.5], results["thunder", 0.5]
    assert thunder.steps_per_min == pytest.approx(sticky.steps_per_min, rel=0.1)
    assert sticky.kv_hit_rate > 0.7


def test_above_it_sticky_thrashes_and_thunder_does_not(results):
    sticky, thunder = results["sticky", 3.0], results["thunder", 3.0]
    assert thunder.kv_hit_rate > sticky.kv_hit_rate + 0.1
    assert thunder.steps_per_min > 1.1 * sticky.steps_per_min
    assert thunder.cost_shares["recompute"] < sticky.cost_shares["recompute"]


def test_every_policy_moves(results):
    assert all(result.num_turns > 0 for result in results.values())


def test_cost_shares_add_up_to_one(results):
    for result in results.values():
        assert sum(result.cost_shares.values()) == pytest.approx(1.0)


def test_the_same_seed_plays_the_same_programs():
    def first(seed: int) -> list:
        scripts = programs(WORKLOAD, seed=seed, slot=3, vocab_size=50)
        return [next(scripts) for _ in range(3)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_a_failing_slot_fails_the_cell():
    async def run() -> None:
        engine = FakeEngine(ENGINE)
        await engine.start()
        service = SchedulerService(SchedulerConfig(policy="sticky"), clock=asyncio.get_running_loop().time)
        service.handle(BackendUp(backend="e0", generation=0, capacity_tokens=16_384, max_running=8))
        service.handle(BackendDown(backend="e0", generation=0, reason="given up"))
        cell = Cell(
            workload=WORKLOAD, policy="sticky", load=1, seed=0, num_programs=1, vocab_size=9, warmup_s=1, measure_s=1
        )
        await cell.run(LocalScheduler(service), {"e0": engine}, capacity_tokens=16_384, block_size=None)

    with pytest.raises(EngineDied):
        run_in_virtual_time(run())
