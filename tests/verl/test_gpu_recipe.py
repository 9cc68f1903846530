"""recipes/verl_swe_gpu as far as one gets without a GPU: verl's own configuration, checks and trainer classes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.import_utils import load_class_from_fqn

from thunder_rollout.verl_adapter.manager import Manager, loop_settings
from thunder_rollout.verl_adapter.sampler import AsyncSampler, Sampler
from thunder_rollout.verl_adapter.versions import TESTED_VERSIONS

RECIPE = Path(__file__).parents[2] / "recipes/verl_swe_gpu"
NODES_OF_8 = {"sync": 1, "separate_async": 2}


def test_it_names_the_verl_that_is_tested() -> None:
    named = (RECIPE / "REQUIRED_VERL.txt").read_text().split()
    assert f"verl[vllm,fsdp]=={TESTED_VERSIONS[-1]}" in named


def arguments(mode: str, *more: str) -> list[str]:
    """What run.sh calls Python with."""
    environment = os.environ | {"PYTHON": "echo", "CONFIG": mode, "MODEL": "/models/m", "DATA": "/data"}
    done = subprocess.run(
        [RECIPE / "run.sh", *more], env=environment, check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.split()


def composed(mode: str) -> DictConfig:
    _, module, _, folder, _, name, *overrides = arguments(mode)
    assert module == "verl.trainer.main_ppo"
    with initialize_config_dir(folder, version_base=None):
        config: DictConfig = compose(name, overrides)
    OmegaConf.resolve(config)
    config.transfer_queue.enable = True  # as verl's task runner does
    return config


@pytest.fixture(scope="module", params=NODES_OF_8)
def config(request: pytest.FixtureRequest) -> DictConfig:
    return composed(request.param)


def test_verl_accepts_the_configuration(config: DictConfig) -> None:
    validate_config(config, use_reference_policy=False, use_critic=False)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert (rollout.name, rollout.calculate_log_probs) == ("vllm", True)
    assert config.trainer.nnodes + rollout.nnodes == NODES_OF_8[config.trainer.v1.trainer_mode]


def test_verls_trainer_takes_it_with_our_sampler(config: DictConfig) -> None:
    mode = config.trainer.v1.trainer_mode
    trainer: Any = get_trainer_cls(mode)(config)
    assert isinstance(trainer.replay_buffer, Sampler if mode == "sync" else AsyncSampler)
    assert trainer.replay_buffer.sync_refill_failed_groups == (mode == "sync")


def test_the_loop_and_verl_agree_on_the_longest_row(config: DictConfig) -> None:
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    agent = loop_settings(rollout.agent.agent_loop_config_path).agent
    assert agent.max_context_tokens == rollout.max_model_len == rollout.prompt_length + rollout.response_length
    assert actor.ppo_max_token_len_per_gpu * actor.ulysses_sequence_parallel_size >= rollout.max_model_len


def test_router_loop_and_manager_are_there(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    assert OmegaConf.load(rollout.router_config_path).router_class == "thunder_rollout.verl_adapter.ProgramRouter"
    assert load_class_from_fqn(rollout.agent.agent_loop_manager_class) is Manager


def test_the_users_overrides_come_last() -> None:
    assert arguments("sync", "trainer.total_epochs=1")[-1] == "trainer.total_epochs=1"


def test_a_submitted_job_runs_the_script_with_its_settings(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\n')
    ray.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "separate_async", "MODEL": "/m"}
    environment |= {"LOOP": "/loop with a space.yaml"}
    done = subprocess.run(
        [RECIPE / "submit.sh", "trainer.nnodes=1"], env=environment, check=True, capture_output=True, text=True
    )
    words = done.stdout.split()
    assert words[:2] == ["job", "submit"]
    assert {"CONFIG=separate_async", "MODEL=/m"} <= set(words)
    assert "LOOP=/loop with a space.yaml" in done.stdout
    assert "ROUTER=" not in done.stdout, "run.sh has the default"
    assert words[-2:] == [str(RECIPE / "run.sh"), "trainer.nnodes=1"]
