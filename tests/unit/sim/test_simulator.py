"""The discrete-event loop: same scheduler, virtual time, the same numbers every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.sim.block_engine import BlockEngine
from thunder_rollout.bench.config import ToolConfig, WorkloadConfig
from thunder_rollout.core.config import POLICIES, AdaptiveConfig, SchedulerConfig
from thunder_rollout.core.events import ProgramEnded, TurnRequested
from thunder_rollout.core.policies.base import PolicyBase, ProgramView, View
from thunder_rollout.errors import ConfigError, ThunderError
from thunder_rollout.sim.measure import SimResult
from thunder_rollout.sim.profiles import EngineProfile
from thunder_rollout.sim.simulator import Setup, Simulation, Window
from thunder_rollout.sim.workloads import make_workload, short_tools

pytestmark = pytest.mark.slow

WORKLOAD = short_tools(
    WorkloadConfig(
        prompt_tokens=300,
        observation_tokens=150,
        output_tokens=30,
        num_turns=8,
        tools=[ToolConfig(name="shell", mean_s=0.1)],
    )
)
PROFILE = EngineProfile(
    name="test",
    source="made up",
    capacity_tokens=16_384,
    block_size=32,
    max_running=64,
    max_batched_tokens=1024,
    max_context_tokens=8_192,
    step_s=2e-3,
    prefill_token_s=6e-5,
    decode_turn_s=2e-4,
    context_token_s=2e-8,
)


def setup(policy: str, load: float, *, seed: int = 0, lives: int = 2) -> Setup:
    num_slots = round(load * 2 * PROFILE.capacity_tokens / WORKLOAD.mean_context_tokens())
    return Setup(
        workload=WORKLOAD,
        profile=PROFILE,
        scheduler=SchedulerConfig(policy=policy, tick_s=1.0),
        window=Window(warmup_turns=8 * num_slots, measure_turns=8 * lives * num_slots),
        num_backends=2,
        num_slots=num_slots,
        seed=seed,
    )


def run(policy: str, load: float, *, seed: int = 0) -> SimResult:
    return Simulation(setup(policy, load, seed=seed)).run()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_and_gives_the_same_numbers_twice(policy: str) -> None:
    result = run(policy, 2.0)
    assert result == run(policy, 2.0)
    assert result != run(policy, 2.0, seed=1)
    assert result.num_rejected == 0
    cost = result.cost
    assert cost.total == pytest.approx(1.0)
    assert len(result.wait_p99_by_decile_s) == 10
    assert 0 <= result.imbalance <= 1


@pytest.mark.parametrize("policy", ["sticky", "thunder"])
@pytest.mark.parametrize("load", [0.5, 2.0])
def test_blocks_or_runs_make_no_difference(policy: str, load: float) -> None:
    exact = Simulation(
        setup(policy, load, lives=1), make_engine=lambda profile: BlockEngine(profile.shape, profile.timing)
    ).run()
    fast = Simulation(setup(policy, load, lives=1)).run()
    assert fast.steps_per_min == pytest.approx(exact.steps_per_min, rel=0.03)
    assert fast.kv_hit_rate == pytest.approx(exact.kv_hit_rate, abs=0.03)


def test_thrashing_shows_above_capacity_and_thunder_avoids_it() -> None:
    below, sticky, thunder = run("sticky", 0.4), run("sticky", 3.0), run("thunder", 3.0)
    assert below.kv_hit_rate > 0.7
    assert sticky.kv_hit_rate < 0.3
    assert thunder.steps_per_min > 1.1 * sticky.steps_per_min
    assert thunder.num_pauses > 0
    assert sticky.num_pauses == 0


@pytest.mark.parametrize("policy", ["adaptive", "thunder"])
def test_an_engine_that_releases_computes_less_again(policy: str) -> None:
    def cached(release: bool) -> float:
        profile = replace(PROFILE, release_on_pause=release)
        runs = [Simulation(replace(setup(policy, 3.0, seed=seed), profile=profile)).run() for seed in range(3)]
        return sum(result.kv_hit_rate for result in runs)

    assert cached(True) > cached(False)


@pytest.mark.parametrize(("load_token_s", "policy"), [(6e-7, "sticky"), (6e-7, "adaptive"), (5e-5, "adaptive")])
def test_what_was_computed_again_is_loaded_where_there_is_a_tier(load_token_s: float, policy: str) -> None:
    """A tier that holds every program; loads at 1% of prefill, and at nearly all of it."""
    tier = replace(PROFILE, host_tokens=8 * PROFILE.capacity_tokens, load_token_s=load_token_s)
    plans = [setup(policy, 3.0, seed=seed) for seed in range(3)]
    alone = [Simulation(plan).run() for plan in plans]
    both = [Simulation(replace(plan, profile=tier)).run() for plan in plans]
    for without, within in zip(alone, both, strict=True):
        assert without.kv_load_rate == 0.0
        assert within.kv_load_rate > 0.0
        assert within.kv_hit_rate > without.kv_hit_rate - 0.02
    gain = sum(result.steps_per_min for result in both) / sum(result.steps_per_min for result in alone)
    assert gain > 0.98
    if policy == "sticky":
        assert gain > 1.3


def test_a_fixed_set_of_programs_gives_the_makespan() -> None:
    fixed = replace(setup("sticky", 0.5), window=Window(num_programs=40))
    result = Simulation(fixed).run()
    assert result.num_turns == 40 * 8
    assert result.makespan_s == pytest.approx(result.measured_s)
    assert Simulation(replace(fixed, profile=replace(PROFILE, step_s=4e-3))).run().makespan_s > result.makespan_s


def test_an_expired_program_gives_its_slot_to_the_next() -> None:
    class Lender(Simulation):
        def _tick(self) -> None:
            super()._tick()
            victim = next(iter(self._programs.values()))
            self._scheduler.handle(ProgramEnded(program=victim.name), self._now)
            self._expired(victim)

    result = Lender(setup("sticky", 0.5)).run()
    assert result.num_turns > 0


def test_time_in_the_wire_costs_throughput() -> None:
    slow = replace(setup("sticky", 0.2), profile=replace(PROFILE, turn_overhead_s=0.5))
    assert Simulation(slow).run().steps_per_min < 0.7 * run("sticky", 0.2).steps_per_min


def test_a_window_in_seconds() -> None:
    timed = replace(setup("sticky", 0.5), window=Window(warmup_s=5.0, measure_s=10.0))
    assert Simulation(timed).run().measured_s == pytest.approx(10.0)


def test_programs_stop_before_the_longest_context() -> None:
    short = replace(PROFILE, max_context_tokens=1_000)
    result = Simulation(replace(setup("sticky", 0.5), profile=short)).run()
    assert result.num_rejected == 0
    with pytest.raises(ConfigError, match="sim_engine"):
        Simulation(replace(setup("sticky", 0.5), workload=make_workload("coding_assistant"))).run()


class Deaf(PolicyBase):
    """Restores nobody; liveness alone moves programs, one on each idle backend."""

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        return program.backend


def test_a_policy_that_admits_nobody_still_moves_by_the_liveness_rule() -> None:
    result = Simulation(setup("sticky", 0.5), policy=Deaf()).run()
    assert result.num_turns > 0


def test_a_scheduler_that_hangs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(setup("sticky", 0.5), policy=Deaf())
    monkeypatch.setattr("thunder_rollout.core.scheduler.moves", lambda state, now: ())
    with pytest.raises(ThunderError, match="policy"):
        simulation.run()


def test_ends_that_nobody_announces_cost_adaptive_little() -> None:
    """As in verl's router; learning that programs are gone takes it a while."""
    told = setup("adaptive", 3.0, lives=4)
    silent = replace(told, scheduler=replace(told.scheduler, adaptive=AdaptiveConfig(silent_ends=True)))
    speeds = [Simulation(each).run().steps_per_min for each in (told, silent, setup("sticky", 3.0, lives=4))]
    assert speeds[1] > 0.9 * speeds[0]
    assert speeds[1] > 2 * speeds[2]
