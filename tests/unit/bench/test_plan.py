"""Which cells a configuration names, and in which order."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.plan import planned_cells
from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.errors import ConfigError


def names(config: BenchConfig) -> list[tuple[float, str, int]]:
    return [(plan.key.load, plan.key.policy, plan.key.seed) for plan in planned_cells(config)]


def test_every_cell_comes_once_before_any_repetition_and_every_other_one_goes_backwards(config):
    once = [(0.5, "sticky"), (0.5, "thunder"), (3.0, "sticky"), (3.0, "thunder")]
    assert names(config) == [(*cell, 0) for cell in once] + [(*cell, 1) for cell in reversed(once)]


def test_overrides_narrow_the_plan_and_replace_the_seeds(config):
    assert names(replace(config, loads=[3.0], policies=["thunder"], seeds=[7, 8])) == [
        (3.0, "thunder", 7),
        (3.0, "thunder", 8),
    ]
    with pytest.raises(ConfigError, match="no cell is left"):
        planned_cells(replace(config, loads=[9.0]))


def test_the_load_counts_mean_contexts_in_the_kv_of_all_engines(config):
    plan = planned_cells(replace(config, loads=[3.0]))[0]
    assert plan.capacity_tokens == 2 * 16_384
    assert plan.num_programs == round(3 * 2 * 16_384 / (300 + 30 + 180 * 3.5))


def test_another_setting_is_another_cell(config):
    keys = {plan.key for plan in planned_cells(config)}
    for changed in (
        replace(config, measure_s=11.0),
        replace(config, rehearsal_lives=0.0),
        replace(config, engine=replace(config.engine, max_num_batched_tokens=512)),
        replace(config, scheduler=replace(config.scheduler, max_wait_s=5.0)),
        replace(config, workload={**config.workload, "short_tools": config.workload["groups"]}),
    ):
        assert not keys & {plan.key for plan in planned_cells(changed)}
    assert keys == {plan.key for plan in planned_cells(replace(config, runs_dir="elsewhere"))}


def test_a_workload_that_no_engine_bears_is_refused(config):
    small = replace(config, engine=replace(config.engine, max_model_len=2_000))
    with pytest.raises(ConfigError, match=r"workload\.short_tools: a context may reach 3180 tokens"):
        planned_cells(small)


def test_cells_that_a_report_could_not_tell_apart_are_refused(config):
    (entry, *_) = config.plan.cells
    entry = replace(entry, policies=["capped"], loads=[4.0])
    twice = replace(config, plan=replace(config.plan, cells=[entry, replace(entry, cap_share=0.7)]))
    with pytest.raises(
        ConfigError, match=r"plan\.cells: 2 of them measure capped on short_tools, qwen2_3m, load 4, seed 0"
    ):
        planned_cells(twice)


def composed(*overrides: str) -> BenchConfig:
    return to_typed(BenchConfig, compose_config("bench", list(overrides)))


def test_make_bench_compares_four_policies_in_less_than_25_minutes():
    plans = planned_cells(composed())
    assert {plan.key.policy for plan in plans} == {"sticky", "capped", "thunder", "adaptive"}
    assert {plan.key.load for plan in plans} == {0.5, 1.0, 2.0, 4.0}
    assert sum(plan.warmup_s + plan.measure_s for plan in plans) + 4 * len(plans) + 60 <= 25 * 60


def test_make_bench_full_has_everything_five_times_in_less_than_three_hours():
    config = composed("plan=full")
    plans = planned_cells(config)
    assert {plan.key.workload for plan in plans} == set(config.workload)
    assert {plan.key.model for plan in plans} == {"qwen2_3m", "qwen2_26m"}
    seeds = [plan.key.seed for plan in plans]
    assert [seeds.count(seed) for seed in range(5)] == [len(plans) / 5] * 5
    starts = 1 + sum((a.key.model, a.engines) != (b.key.model, b.engines) for a, b in pairwise(plans))
    assert sum(plan.warmup_s + plan.measure_s for plan in plans) + 4 * len(plans) + 40 * starts <= 3 * 3600


def test_seeds_and_loads_are_hydra_overrides():
    plans = planned_cells(composed("loads=[4]", "seeds=[0,1]"))
    assert {(plan.key.load, plan.key.seed) for plan in plans} == {(4.0, 0), (4.0, 1)}


def test_a_misspelt_field_deep_in_the_plan_is_named():
    with pytest.raises(
        ConfigError, match=r"plan\.cells\.0\.polices: no such field; did you mean plan\.cells\.0\.policies"
    ):
        composed("plan.cells=[{workload: short_tools, polices: [sticky], loads: [1], seeds: [0]}]")
    with pytest.raises(ConfigError, match=r"workload\.groups\.group_sise"):
        composed("+workload.groups.group_sise=3")
