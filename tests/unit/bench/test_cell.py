"""The benchmark's closed loop on engines without a model, in virtual time: the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thunder_rollout.bench.cell import CellResult, run_cell
from thunder_rollout.bench.config import BenchConfig, CellsConfig, PlanConfig
from thunder_rollout.bench.plan import CellPlan, planned_cells
from thunder_rollout.bench.rehearsal import VOCAB_SIZE, rehearse, stage
from thunder_rollout.bench.workload import random_positions
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import FolderWeights
from thunder_rollout.errors import EngineDied
from thunder_rollout.runtime.weights import update_weights

pytestmark = pytest.mark.slow


def plan_of(config: BenchConfig, workload: str, policy: str, load: float, **changes: float) -> CellPlan:
    settings = {"warmup_s": 10.0, "measure_s": 20.0, **changes}
    cells = CellsConfig(workload=workload, policies=[policy], loads=[load], seeds=[0], **settings)
    (plan,) = planned_cells(replace(config, plan=PlanConfig(name="bench", cells=[cells])))
    return plan


def play(plan: CellPlan, *, lives: float = 0.0, dead: bool = False) -> CellResult:
    start = rehearse(plan, lives=lives)

    async def run() -> CellResult:
        async with stage(plan) as (scheduler, engines):
            if dead:
                for engine in engines.values():
                    engine.die()

            async def update(version: str) -> None:
                await update_weights(scheduler, engines, FolderWeights(path="."), version=version)

            return await run_cell(
                plan,
                start,
                scheduler,
                engines,
                capacities=dict.fromkeys(engines, 16_384),
                vocab_size=VOCAB_SIZE,
                update_weights=update,
            )

    return run_in_virtual_time(run())


def test_below_the_knee_thunder_is_sticky(config):
    sticky, thunder = (play(plan_of(config, "short_tools", policy, 0.5)) for policy in ("sticky", "thunder"))
    assert thunder.steps_per_min == pytest.approx(sticky.steps_per_min, rel=0.1)
    assert sticky.kv_hit_rate > 0.7


def test_above_it_sticky_thrashes_and_thunder_does_not(config):
    sticky, thunder = (play(plan_of(config, "short_tools", policy, 3.0)) for policy in ("sticky", "thunder"))
    assert thunder.kv_hit_rate > sticky.kv_hit_rate + 0.1
    assert thunder.steps_per_min > 1.1 * sticky.steps_per_min
    assert thunder.cost_shares["recompute"] < sticky.cost_shares["recompute"]
    assert thunder.recomputed_tokens < sticky.recomputed_tokens
    for row in (sticky, thunder):
        assert sum(row.cost_shares.values()) == pytest.approx(1.0)
        assert row.kv_hit_rate < row.infinite_kv_hit_rate
    assert thunder.longest_wait_s > sticky.longest_wait_s == 0, "sticky lets everybody in"


def test_where_nothing_is_evicted_the_hits_are_those_of_infinite_kv(config):
    for workload in ("short_tools", "groups"):
        row = play(plan_of(config, workload, "sticky", 0.2, warmup_s=20.0))
        assert row.num_ended > 0
        assert row.kv_hit_rate == pytest.approx(row.infinite_kv_hit_rate, abs=0.03)


def test_a_cell_goes_on_from_its_rehearsal(config):
    plan = plan_of(config, "short_tools", "capped", 3.0)
    start = rehearse(plan, lives=1.2)
    assert rehearse(plan, lives=1.2) == start
    assert len(start) == len({position.index for position in start}) == plan.num_programs
    admitted, waiting = start[: plan.max_programs], start[plan.max_programs :]
    assert sum(position.num_turns_over for position in admitted) > 0
    assert all(position.num_turns_over == 0 for position in waiting), "who waits for capped has never begun"
    assert [position.index for position in waiting] == sorted(position.index for position in waiting)
    assert max(position.index for position in start) >= 2 * plan.num_programs, "the first ones are over"
    assert play(plan, lives=1.2).num_turns > 0


def test_a_short_window_after_a_rehearsal_does_the_steps_of_the_steady_state(config):
    steady = play(plan_of(config, "short_tools", "capped", 4.0, warmup_s=60.0, measure_s=60.0), lives=1.2)
    short = plan_of(config, "short_tools", "capped", 4.0, warmup_s=6.0, measure_s=12.0)
    assert play(short, lives=1.2).steps_per_min == pytest.approx(steady.steps_per_min, rel=0.1)
    assert play(short, lives=0.0).steps_per_min < 0.9 * steady.steps_per_min, "old programs first prefill what they had"


def test_new_weights_void_what_could_be_reused(config):
    row = play(plan_of(config, "weight_updates", "sticky", 0.3, measure_s=30.0))
    still = play(plan_of(config, "short_tools", "sticky", 0.3, measure_s=30.0))
    assert row.num_weight_updates == 3
    assert row.infinite_kv_hit_rate < still.infinite_kv_hit_rate
    assert row.kv_hit_rate == pytest.approx(row.infinite_kv_hit_rate, abs=0.001)
    assert row.recomputed_tokens > 4 * still.recomputed_tokens, "turns in flight go on from what they compute again"


@pytest.mark.parametrize(("workload", "off_by"), [("weight_updates", 0.001), ("updated_groups", 0.01)])
def test_programs_that_wait_over_an_update_can_reuse_what_they_really_can(config, workload, off_by):
    """Few are let in, so that nothing is evicted: every hit that was possible was one."""
    groups = replace(config.workload["weight_updates"], group_size=4)
    config = replace(config, num_engines=1, workload={**config.workload, "updated_groups": groups})
    plan = plan_of(config, workload, "capped", 3.0, measure_s=50.0, cap_share=0.3)
    row = play(plan, lives=1.2)
    assert row.num_weight_updates == 5
    assert row.longest_wait_s > 5, "some wait over an update"
    assert row.kv_hit_rate == pytest.approx(row.infinite_kv_hit_rate, abs=off_by)


def test_engines_may_be_uneven(config):
    plan = plan_of(config, "uneven_engines", "thunder", 2.0)
    assert [engine.kv_cache_tokens for engine in plan.engines] == [16_384, 8_192]
    assert play(plan).kv_tokens == [16_384, 8_192]


def test_a_failing_slot_fails_the_cell(config):
    with pytest.raises(EngineDied):
        play(plan_of(config, "short_tools", "sticky", 0.1), dead=True)


def test_random_ages_are_the_same_for_every_policy(config):
    plans = [plan_of(config, "short_tools", policy, 1.0) for policy in ("sticky", "thunder")]
    first, second = (random_positions(plan.workload, seed=0, num_slots=plan.num_programs) for plan in plans)
    assert first == second
    assert len({position.num_turns_over for position in first}) > 4
