"""From which version on verl will drop a row, against verl's own rule."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from thunder_rollout.verl_adapter.staleness import stale_from


def trainer(
    mode: str = "separate_async", threshold: int | None = 3, strategy: str = "drop", use_v1: bool = True
) -> DictConfig:
    sampler = {"max_off_policy_threshold": threshold, "max_off_policy_strategy": strategy}
    return OmegaConf.create({"use_v1": use_v1, "v1": {"trainer_mode": mode, "sampler": sampler}})


@pytest.mark.parametrize("threshold", [2, 3, 8])
def test_every_step_that_can_sample_a_row_of_that_version_drops_it_and_none_before(threshold: int) -> None:
    dispatched_at = 5
    limit = stale_from(trainer(threshold=threshold), dispatched_at)
    assert limit is not None
    verl_drops = lambda step: step - dispatched_at + 1 > threshold
    assert verl_drops(limit + 1)  # a step samples under at least the version before it
    assert not verl_drops(limit)


def test_validation_runs_under_the_version_of_its_step_and_is_never_stale() -> None:
    step = 4
    assert stale_from(trainer(threshold=1), step) == step + 1


@pytest.mark.parametrize(
    "settings",
    [trainer(mode="sync"), trainer(threshold=None), trainer(strategy="wait"), trainer(use_v1=False)],
    ids=["sync", "no bound", "wait", "v0"],
)
def test_nothing_is_in_vain_where_verl_drops_nothing(settings: DictConfig) -> None:
    assert stale_from(settings, 5) is None


def test_a_row_that_nobody_dispatched_is_never_stale() -> None:
    assert stale_from(trainer(), None) is None
