"""What a run shows and records of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.errors import ConfigError

WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """`auto` is online for a user who is logged in to wandb and offline otherwise."""

    mode: str = "auto"
    project: str = "thunder_rollout"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise ConfigError(f"observe.wandb.mode={self.mode!r}: must be one of {', '.join(WANDB_MODES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveConfig:
    progress: bool = True  # a live table on a terminal, a line now and then elsewhere
    refresh_s: float = 1.0
    log_every_s: float = 10.0  # wandb and the plain progress line
    trace: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        for name in ("refresh_s", "log_every_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"observe.{name}={getattr(self, name)!r}: must be > 0")
