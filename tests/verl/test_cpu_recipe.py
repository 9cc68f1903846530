"""The recipe's files are what verl and our agent loop take."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import validate_config
from verl.utils.import_utils import load_extern_object

from thunder_rollout.verl_adapter.settings import read_settings
from thunder_rollout.verl_adapter.versions import TESTED_VERSIONS

RECIPE = Path(__file__).parents[2] / "recipes" / "verl_cpu_toy"


@pytest.fixture(params=["sync", "separate_async"])
def config(request: pytest.FixtureRequest):
    given = ["actor_rollout_ref.model.path=x", "data.train_files=x", "data.val_files=x"]
    given.append("actor_rollout_ref.rollout.router_config_path=x")
    loop = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={RECIPE / 'thunder_swe.yaml'}"
    with initialize_config_dir(str(RECIPE), version_base=None):
        return compose(request.param, [*given, loop])


def test_verl_accepts_the_configuration(config) -> None:
    assert not need_critic(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=False)


def test_one_seed_is_everyones(config) -> None:
    config.data.seed = 7
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert (rollout.seed, actor.data_loader_seed) == (7, 7)


def test_the_agent_loops_settings_are_ours(config) -> None:
    (loop,) = OmegaConf.load(config.actor_rollout_ref.rollout.agent.agent_loop_config_path)
    assert loop.name == config.actor_rollout_ref.rollout.agent.default_agent_loop
    assert read_settings(loop.settings).sandbox.backend == "local"


def test_the_sampler_is_verls_with_another_pause(config) -> None:
    mode, sampler = config.trainer.v1.trainer_mode, config.trainer.v1.sampler
    make = load_extern_object(sampler.custom_sampler.path, sampler.custom_sampler.name)
    buffer = make(
        trainer_mode=mode,
        trainer_config=config.trainer.v1[mode],
        max_off_policy_threshold=sampler.max_off_policy_threshold,
        max_off_policy_strategy=sampler.max_off_policy_strategy,
        sampler_kwargs=sampler.sampler_kwargs,
        refill_fn=None,
    )
    assert isinstance(buffer, ReplayBuffer)
    assert buffer.poll_interval == sampler.sampler_kwargs.poll_interval < 2.0


def test_the_recipe_names_the_tested_verl() -> None:
    """And TransferQueue, which verl's own extras alone would bring."""
    named = (RECIPE / "REQUIRED_VERL.txt").read_text().split()
    assert named[:-1] == [f"verl=={version}" for version in TESTED_VERSIONS]
    assert named[-1] == f"TransferQueue=={importlib.metadata.version('TransferQueue')}"


def test_curves_are_drawn_from_verls_metrics(tmp_path: Path) -> None:
    for seed, gain in (("seed0", 0.2), ("seed1", 0.3)):
        (tmp_path / seed).mkdir()
        lines = [
            {"step": 0, "data": {"val-core/toy/acc/mean@1": 0.5}},
            {"step": 1, "data": {"critic/score/mean": 0.55, "timing_s/step": 9.0}},
            {"step": 2, "data": {"critic/score/mean": 0.6, "val-core/toy/acc/mean@1": 0.5 + gain}},
        ]
        (tmp_path / seed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "just_begun").mkdir()
    (tmp_path / "just_begun" / "metrics.jsonl").write_text("")
    done = subprocess.run(
        [sys.executable, str(RECIPE / "curves.py"), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "seed1: 0.500 -> 0.800 (+0.300) after 2 steps" in done.stdout
    assert "mean gain +0.250" in done.stdout
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 7
    assert (tmp_path / "curves.png").stat().st_size > 1000
