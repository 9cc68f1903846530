"""Settings of `thunder-rollout bench` (workloads, the plan of its cells) and `bench-core`."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.core.config import POLICIES, SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.config import RayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolConfig:
    """One kind of tool call; seconds are lognormal with this mean and sigma."""

    name: str
    share: float = 1.0  # of the calls
    mean_s: float
    spread: float = 0.5

    def __post_init__(self) -> None:
        if self.share <= 0 or self.mean_s < 0 or self.spread < 0:
            raise ConfigError(f"tool {self.name!r}: share must be > 0, mean_s and spread >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """A program is `num_turns` turns over a growing context; lengths are lognormal with these means (tokens).

    `size_range` scales each program's prompt and observations by a factor drawn log-uniformly. The programs of
    a group share their first prompt. `kv_shares` are the engines' KV pools as shares of the plan's, in turn.
    """

    name: str = "short_tools"
    num_turns: int = 12
    prompt_tokens: int = 700
    observation_tokens: int = 380
    output_tokens: int = 60
    spread: float = 0.5  # sigma of the lognormals
    max_context_tokens: int = 16_000  # a program that would grow beyond ends before
    tools: list[ToolConfig] = field(default_factory=lambda: [ToolConfig(name="shell", mean_s=0.15)])
    size_range: list[float] = field(default_factory=lambda: [1.0, 1.0])
    group_size: int = 1
    kv_shares: list[float] = field(default_factory=lambda: [1.0])
    weight_update_s: float | None = None  # new weights so often, the first after half of it in the window

    def __post_init__(self) -> None:
        for name in ("num_turns", "prompt_tokens", "observation_tokens", "output_tokens", "group_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"workload.{self.name}.{name}={getattr(self, name)!r}: must be at least 1")
        if self.spread < 0 or not self.tools:
            raise ConfigError(f"workload.{self.name}: spread must be >= 0, and tools name at least one")
        if len(self.size_range) != 2 or not 0 < self.size_range[0] <= self.size_range[1]:
            raise ConfigError(f"workload.{self.name}.size_range={self.size_range!r}: give [least, most], both > 0")
        if not self.kv_shares or min(self.kv_shares) <= 0:
            raise ConfigError(f"workload.{self.name}.kv_shares={self.kv_shares!r}: must be > 0, one at least")
        if self.weight_update_s is not None and self.weight_update_s <= 0:
            raise ConfigError(f"workload.{self.name}.weight_update_s={self.weight_update_s!r}: must be > 0, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsConfig:
    """Part of a plan: `workload` under each policy at each load, once a seed.

    `load` = programs x mean context / KV tokens of all engines. `cap_share` sets the limit of `capped`, as a
    share of the programs whose mean contexts fill all KV. A cell is `warmup_s` not counted, then `measure_s`.
    """

    workload: str
    policies: list[str]
    loads: list[float]
    seeds: list[int]
    model: str = "qwen2_3m"  # a preset of engine.random_model, made on the spot
    kv_cache_tokens: int | None = None  # of an engine; null: engine.kv_cache_tokens
    cap_share: float = 0.6
    warmup_s: float = 8.0
    measure_s: float = 20.0

    def __post_init__(self) -> None:
        for policy in self.policies:
            if policy not in POLICIES:
                raise ConfigError(f"plan.cells: no policy {policy!r}; it must be one of {', '.join(POLICIES)}")
        if not self.policies or not self.loads or not self.seeds:
            raise ConfigError("plan.cells: policies, loads, seeds: each needs at least one value")
        if min(self.loads) <= 0 or self.cap_share <= 0:
            raise ConfigError("plan.cells: loads and cap_share must be > 0")
        if self.warmup_s < 0 or self.measure_s <= 0:
            raise ConfigError("plan.cells: measure_s must be > 0, and warmup_s >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """The cells of a run, the key comparisons first: the first seed of each, then the second, and so on."""

    name: str  # of the folder in runs_dir
    cells: list[CellsConfig]

    def __post_init__(self) -> None:
        if not self.cells:
            raise ConfigError("plan.cells: needs at least one entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """The plan, and what to make of it: `workloads`, `policies` and `loads` leave only these of its cells (null:
    all); `seeds`, `warmup_s` and `measure_s` take the place of each entry's own."""

    engine: EngineConfig
    plan: PlanConfig
    workload: dict[str, WorkloadConfig]
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    runs_dir: str = "runs"
    num_engines: int = 2
    rehearsal_lives: float = 1.2  # of programs a slot, in virtual time, before a cell begins
    workloads: list[str] | None = None
    policies: list[str] | None = None
    loads: list[float] | None = None
    seeds: list[int] | None = None
    warmup_s: float | None = None
    measure_s: float | None = None

    def __post_init__(self) -> None:
        if self.num_engines < 1:
            raise ConfigError(f"num_engines={self.num_engines!r}: must be at least 1")
        if self.rehearsal_lives < 0:
            raise ConfigError(f"rehearsal_lives={self.rehearsal_lives!r}: must be >= 0")
        if self.engine.kv_cache_tokens is None:
            raise ConfigError("engine.kv_cache_tokens: must be given, for the loads are counted in it")
        for cells in self.plan.cells:
            if cells.workload not in self.workload:
                known = ", ".join(self.workload)
                raise ConfigError(f"plan.cells: no workload {cells.workload!r}; it must be one of {known}")


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
