"""Settings of `thunder-rollout bench` (the workload, the loads, the policies compared) and `bench-core`."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.core.config import POLICIES, SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.config import RayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """A program is `num_turns` turns over a growing context; lengths are lognormal with these
    means (tokens), tool times with this mean (seconds)."""

    name: str = "short_tools"
    num_turns: int = 12
    prompt_tokens: int = 700
    observation_tokens: int = 380
    output_tokens: int = 60
    tool_s: float = 0.15
    spread: float = 0.5  # sigma of the lognormals

    def __post_init__(self) -> None:
        for name in ("num_turns", "prompt_tokens", "observation_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"workload.{name}={getattr(self, name)!r}: must be at least 1")
        if self.tool_s < 0 or self.spread < 0:
            raise ConfigError("workload.tool_s and workload.spread: must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One cell is one policy at one load: `warmup_s` not counted, then `measure_s`.

    `load` = programs x mean context / KV tokens of all engines. `extra_policies` run only at
    `extra_loads`. `cap_shares` are the limits that the sweep for `capped` tries, as shares of the
    programs whose mean contexts fill all KV.
    """

    engine: EngineConfig
    model: str = "qwen2_3m"  # a preset of engine.random_model, made on the spot
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    runs_dir: str = "runs"
    num_engines: int = 2
    policies: list[str] = field(default_factory=lambda: ["sticky", "capped", "thunder", "adaptive"])
    loads: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    extra_policies: list[str] = field(default_factory=lambda: ["round_robin", "cache_aware"])
    extra_loads: list[float] = field(default_factory=lambda: [4.0])
    seeds: list[int] = field(default_factory=lambda: [0])
    cap_shares: list[float] = field(default_factory=lambda: [0.4, 0.55, 0.7, 0.9])
    warmup_s: float = 20.0
    measure_s: float = 30.0

    def __post_init__(self) -> None:
        for policy in self.policies + self.extra_policies:
            if policy not in POLICIES:
                raise ConfigError(f"policies: no policy {policy!r}; it must be one of {', '.join(POLICIES)}")
        if not self.policies or not self.loads or not self.seeds:
            raise ConfigError("policies, loads, seeds: each needs at least one value")
        if min(self.loads + self.extra_loads) <= 0:
            raise ConfigError("loads: must be > 0")
        if self.warmup_s < 0 or self.measure_s <= 0:
            raise ConfigError("measure_s: must be > 0, and warmup_s >= 0")
        if self.num_engines < 1:
            raise ConfigError(f"num_engines={self.num_engines!r}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCoreConfig:
    """Each of `sizes`, (programs, backends), is measured; contexts are `context_tokens` in the mean, of which
    a group's samples share `shared_tokens`. `num_actor_turns` (0: none) go through a real scheduler actor."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runs_dir: str = "runs"
    sizes: list[list[int]] = field(default_factory=lambda: [[1000, 51], [1000, 512], [10_000, 512]])
    num_events: int = 60_000  # timed, after every program had a turn
    context_tokens: int = 32_000
    shared_tokens: int = 6_000
    block_size: int = 16
    group_size: int = 8
    capacity_tokens: int = 400_000  # of a backend
    num_restarts: int = 20  # backends that die and return
    num_actor_turns: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_events", "context_tokens", "block_size", "group_size", "capacity_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be at least 1")
        for name in ("shared_tokens", "num_restarts", "num_actor_turns"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be >= 0")
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise ConfigError(f"sizes={self.sizes!r}: give at least one pair [programs, backends], all >= 1")
        if self.shared_tokens >= self.context_tokens / 2:
            raise ConfigError(f"shared_tokens={self.shared_tokens}: must be under half of context_tokens")
        if 4 * self.context_tokens > self.capacity_tokens:
            raise ConfigError(
                f"capacity_tokens={self.capacity_tokens}: must be at least four times context_tokens="
                f"{self.context_tokens}, for some contexts are three times the mean"
            )
