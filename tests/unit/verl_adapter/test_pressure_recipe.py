"""What the recipe that sets two balancers against each other plays, and what it concludes."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support.recipes import load_recipe
from thunder_rollout.errors import ConfigError


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("verl_pressure", "measure.py")


def settings(recipe: ModuleType, *, num_pairs: int = 4) -> Any:
    loads = [recipe.LoadPlan(load=4.0, num_pairs=num_pairs), recipe.LoadPlan(load=0.5, num_pairs=2)]
    return recipe.PressureConfig(
        seed=3, loads=loads, model="qwen2_26m", num_turns=4, max_context_tokens=8192, router=None
    )


def row(recipe: ModuleType, balancer: str, seed: int, gen_s: float, *, load: float = 4.0, cached: int = 0) -> Any:
    turns = [
        {"prompt_tokens": 100, "known_tokens": 0, "cached_tokens": 0, "turn_s": 1.0},
        {"prompt_tokens": 300, "known_tokens": 200, "cached_tokens": cached, "turn_s": 3.0},
    ]
    step = recipe.Step(load=load, seed=seed, balancer=balancer)
    return recipe.row_of(step, gen_s, [turns], {"thunder/router/num_turns": 2.0} if balancer == "router" else {})


def test_both_steps_of_a_pair_have_its_seed_and_every_other_pair_goes_backwards(recipe: ModuleType) -> None:
    steps = [step for step in recipe.planned_steps(settings(recipe)) if step.load == 4.0]
    order = "".join(step.balancer[0] for step in steps)
    assert order == "vrrvvrrv"
    assert Counter(step.seed for step in steps) == {3: 2, 4: 2, 5: 2, 6: 2}


def test_a_steps_programs_are_its_load_and_their_tokens_follow_from_its_seed(recipe: ModuleType) -> None:
    workload = recipe.workload_of(settings(recipe))
    capacity = round(10 * recipe.mean_context_tokens(workload))
    verl, router, other = (
        recipe.scripts_of(workload, recipe.Step(load=4.0, seed=seed, balancer=name), capacity, 512)
        for seed, name in ((3, "verl"), (3, "router"), (4, "router"))
    )
    assert len(verl) == len(other) == 40
    assert verl == router
    assert verl[0].turns[0].new_ids != other[0].turns[0].new_ids


def test_a_program_that_may_not_fit_is_refused_by_the_settings_name(recipe: ModuleType) -> None:
    workload = recipe.workload_of(settings(recipe))
    rollout = {"max_model_len": 8192, "response_length": 8192, "prompt_length": 1400}
    recipe.check_room(workload, OmegaConf.create(rollout), [8192, 8192])
    for name in rollout:
        with pytest.raises(ConfigError, match=name):
            recipe.check_room(workload, OmegaConf.create(rollout | {name: 1000}), [8192, 8192])
    with pytest.raises(ConfigError, match="num_gpu_blocks_override"):
        recipe.check_room(workload, OmegaConf.create(rollout), [8192, 1024])


def test_a_row_says_what_came_from_the_cache(recipe: ModuleType) -> None:
    one = row(recipe, "verl", 0, 9.0, cached=100)
    assert (one.num_programs, one.num_turns, one.kv_hit_rate, one.infinite_kv_hit_rate) == (1, 2, 0.25, 0.5)
    assert (one.turn_p50_s, one.turn_p95_s) == pytest.approx((2.0, 2.9))


def test_a_cache_that_was_not_cleared_is_no_measurement(recipe: ModuleType) -> None:
    turns = [{"prompt_tokens": 100, "known_tokens": 0, "cached_tokens": 32, "turn_s": 1.0}] * 2
    with pytest.raises(RuntimeError, match="first turn"):
        recipe.row_of(recipe.Step(load=4.0, seed=0, balancer="verl"), 1.0, [turns], {})


@pytest.mark.parametrize(("share", "is_met"), [(0.79, True), (0.81, False)])
def test_under_pressure_the_mean_of_paired_ratios_decides(recipe: ModuleType, share: float, is_met: bool) -> None:
    rows = [row(recipe, "verl", seed, gen_s) for seed, gen_s in ((0, 10.0), (1, 30.0))]
    rows += [row(recipe, "router", seed, share * gen_s) for seed, gen_s in ((1, 30.0), (0, 10.0), (2, 1.0))]
    (one,) = recipe.compared(rows)
    assert one.ratio.mean == pytest.approx(share)
    assert one.is_met == is_met
    assert [r.seed for r in one.rows["router"]] == [0, 1], "the third has no other"


@pytest.mark.parametrize(("router_s", "is_met"), [((10.5, 11.5), True), ((20.0, 20.1), False), ((1.0, 1.1), False)])
def test_below_it_the_intervals_must_overlap(recipe: ModuleType, router_s: tuple[float, float], is_met: bool) -> None:
    rows = [row(recipe, "verl", seed, gen_s, load=0.5) for seed, gen_s in enumerate((10.0, 10.2))]
    rows += [row(recipe, "router", seed, gen_s, load=0.5) for seed, gen_s in enumerate(router_s)]
    (one,) = recipe.compared(rows)
    assert one.is_met == is_met


def test_the_report_has_a_line_for_each_balancer_and_the_csv_the_routers_figures(
    recipe: ModuleType, tmp_path: Path
) -> None:
    rows = [row(recipe, "verl", 0, 10.0), row(recipe, "router", 0, 5.0, cached=200)]
    assert "| 4 | 1 | 2 | `router` | 1 | 5.0 | 0.50 | 0.50 | 1.00 | 2.0 / 2.9 |" in recipe.table(rows)
    recipe.write_csv(rows, tmp_path / "steps.csv")
    with (tmp_path / "steps.csv").open() as file:
        verl, router = csv.DictReader(file)
    assert (verl["balancer"], verl["thunder/router/num_turns"]) == ("verl", "")
    assert (router["gen_s"], router["thunder/router/num_turns"]) == ("5.0", "2.0")
