"""The router's YAML (`conf/verl/thunder_router.yaml`), which verl reads and hands over as a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from thunder_rollout.config import to_typed
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """`capacity_tokens` and `block_size` stand in for those of replicas that do not tell theirs."""

    router_class: str
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    poll_s: float = 1.0  # replicas are asked for their state, besides at the end of each turn
    orphan_s: float = 60.0  # a granted turn that its replica has not had for so long has lost its caller
    forget_after_s: float = 600.0  # a program idle for so long leaves the books; it may come back, as old as it was
    capacity_tokens: int | None = None  # KV tokens of one SGLang or TensorRT-LLM replica
    block_size: int = 16  # of such a replica

    def __post_init__(self) -> None:
        for name in ("poll_s", "orphan_s", "forget_after_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be > 0")
        if self.capacity_tokens is not None and self.capacity_tokens < 1:
            raise ConfigError(f"capacity_tokens={self.capacity_tokens!r}: must be at least 1, or null")
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size!r}: must be at least 1")
        for name in ("lease_s", "max_staleness"):
            if getattr(self.scheduler, name) is not None:
                raise ConfigError(
                    f"scheduler.{name}={getattr(self.scheduler, name)!r}: must be null in a router's file, for verl "
                    "tells a router neither of a program's life nor of its tokens' weights"
                )


def parse(raw: Mapping[str, Any]) -> RouterConfig:
    """Raises `ConfigError` naming the field."""
    return to_typed(RouterConfig, OmegaConf.create(dict(raw)))
