"""What the recipe that kills parts of a training calls lost, and what it reads out of a log."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.support.recipes import load_recipe

NUM_STEPS = 4


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("verl_failures", "kill_processes.py")


@pytest.fixture
def trained(recipe: ModuleType) -> dict[int, list[str]]:
    """The prompts of each step's rows, as they should be."""
    steps, places = range(1, NUM_STEPS + 1), range(recipe.NUM_PROMPTS)
    batches = {step: [f"{step}.{place}" for place in places] for step in steps}
    return {step: batch * recipe.NUM_SAMPLES for step, batch in batches.items()}


@pytest.fixture
def prompts(trained: dict[int, list[str]]) -> set[str]:
    return {prompt for batch in trained.values() for prompt in batch}


def test_an_epoch_is_whole_if_each_prompt_has_all_its_samples_in_one_step(recipe, trained, prompts) -> None:
    assert recipe.check_rows(prompts, trained, NUM_STEPS, may_miss=[]) == []


def test_a_sample_that_is_missing_is_lost(recipe, trained, prompts) -> None:
    trained[2].remove("2.0")
    assert recipe.check_rows(prompts, trained, NUM_STEPS, may_miss=[]) == [
        f"step 2: {recipe.NUM_SAMPLES - 1} rows of 2.0"
    ]


def test_a_batch_that_is_trained_on_again_in_the_place_of_another_is_wrong(recipe, trained, prompts) -> None:
    trained[4] = trained[3]
    wrong = recipe.check_rows(prompts, trained, NUM_STEPS, may_miss=[])
    assert "3.0 in 2 steps" in wrong
    assert f"{recipe.NUM_PROMPTS} prompts were never trained on" in wrong


def test_only_the_rows_of_the_checkpoint_may_be_untold(recipe, trained, prompts) -> None:
    del trained[3]
    assert recipe.check_rows(prompts, trained, NUM_STEPS, may_miss=[3]) == []
    assert recipe.check_rows(prompts, trained, NUM_STEPS, may_miss=[2]) == ["step 3 has no rows"]


def test_the_reason_of_an_end_is_ours_before_the_last_error(recipe, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x\n\x1b[36mTaskRunner\x1b[0m RolloutDied: replica 0 is gone\nActorDiedError: the actor died\nbye\n")
    assert recipe.reason_of(log) == "TaskRunner RolloutDied: replica 0 is gone"
    log.write_text("x\nRayActorError: the actor died\nbye\n")
    assert recipe.reason_of(log) == "RayActorError: the actor died"
