"""Settings of `thunder_swe`, as they stand beside its name in the file of `agent.agent_loop_config_path`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.config import to_typed
from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.tasks.grading import GradingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SweSettings:
    """The system prompt is each row's own. What an episode may take is also bounded by verl's
    `rollout.prompt_length`, `response_length` and `max_model_len`."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    max_attempts: int = 3  # at an episode, and at its grading, where the machinery fails
    mask_unfinished: bool = False  # an episode that ends without `submit` gives no gradient; its reward counts

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"settings.max_attempts={self.max_attempts}: must be >= 1")
        if self.sandbox.limits.ttl_s <= self.agent.max_episode_s:
            raise ConfigError(
                f"settings.sandbox.limits.ttl_s={self.sandbox.limits.ttl_s:g}: must be above "
                f"settings.agent.max_episode_s={self.agent.max_episode_s:g}, which leaves out what an episode waits; "
                "many times that is right"
            )


def read_settings(raw: Any) -> SweSettings:
    """`raw` is the mapping `settings` of the file; raises `ConfigError` naming the field."""
    return to_typed(SweSettings, raw if isinstance(raw, DictConfig) else OmegaConf.create(raw or {}))
