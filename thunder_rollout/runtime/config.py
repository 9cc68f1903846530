"""Settings of the driver: how many samples, engines and workers, and on which Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.engine.weights import UpdateMode
from thunder_rollout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """`n`, `temperature`, `top_p` and `top_k` are verl's `rollout.*`."""

    n: int = 4  # samples of each task (a GRPO group)
    num_engines: int = 2
    max_engines: int | None = None  # more join where the cluster gains room; null: only in the place of one given up
    drain_s: float = 60.0  # turns in flight of an engine that leaves may finish for so long
    num_workers: int = 2
    concurrency: int = 32  # samples in flight over all workers
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_attempts: int = 3  # tries of a sample that infrastructure failures interrupt
    update_mode: UpdateMode = UpdateMode.KEEP  # what becomes of turns in flight when weights change
    update_batch: int | None = None  # engines updated at a time; null: all at once
    update_weights_bucket_megabytes: int = 2048  # of a trainer's tensors, handed on at a time; verl's word
    weights_folder: str | None = None  # checkpoints that appear there are loaded; see runtime.weights.WeightsFolder

    def __post_init__(self) -> None:
        at_least_1 = ("n", "num_engines", "num_workers", "concurrency", "max_attempts")
        for name in (*at_least_1, "update_weights_bucket_megabytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)!r}: must be at least 1")
        if self.update_batch is not None and self.update_batch < 1:
            raise ConfigError(
                f"rollout.update_batch={self.update_batch!r}: must be at least 1, or null for all at once"
            )
        if self.max_engines is not None and self.max_engines < self.num_engines:
            raise ConfigError(
                f"rollout.max_engines={self.max_engines!r}: must be at least rollout.num_engines={self.num_engines}, "
                "or null"
            )
        if self.drain_s < 0:
            raise ConfigError(f"rollout.drain_s={self.drain_s!r}: must be >= 0")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"rollout.temperature={self.temperature!r}: must be in [0, 2] (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p!r}: must be in (0, 1]")
        if self.top_k != -1 and self.top_k < 1:
            raise ConfigError(f"rollout.top_k={self.top_k!r}: must be -1 (off) or at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """`address` null starts a private cluster that ends with the run; `auto` joins a running one."""

    address: str | None = None
    num_cpus: int | None = None  # of a private cluster; null: what the machine has
    num_gpus: int | None = None
