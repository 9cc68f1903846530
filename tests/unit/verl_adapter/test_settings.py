"""The agent loop's file that ships, and what is wrong with others."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.config import conf_dir
from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.verl_rows import AGENT_NAME
from thunder_rollout.verl_adapter.settings import SweSettings, read_settings


def test_the_file_that_ships_names_the_loop_and_has_the_defaults() -> None:
    (entry,) = OmegaConf.load(conf_dir() / "verl/thunder_swe.yaml")
    assert (entry.name, entry._target_) == (AGENT_NAME, "thunder_rollout.verl_adapter.agent_loop.SweAgentLoop")
    assert read_settings(entry.settings) == SweSettings()


def test_settings_left_out_have_their_defaults() -> None:
    assert read_settings(None) == SweSettings()
    assert read_settings({"agent": {"max_turns": 3}}).agent == AgentConfig(max_turns=3)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"agent": {"max_turn": 3}}, "agent.max_turn"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"sandbox": {"limits": {"ttl_s": 5.0}}}, "ttl_s"),
    ],
)
def test_a_setting_that_is_wrong_is_named(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        read_settings(raw)
