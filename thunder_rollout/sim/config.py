"""Settings of `thunder-rollout simulate` and `thunder-rollout calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.core.config import POLICIES, SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.bounds import BOUNDS
from thunder_rollout.sim.profiles import EngineProfile
from thunder_rollout.sim.workloads import WORKLOADS


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """One cell is one workload under one policy at one load and seed.

    `load` = programs x mean context / KV tokens of all backends. A window of lives warms up for so
    many programs a slot and measures so many; `measure_s` and `warmup_s` (virtual seconds) replace
    it. With `makespan_programs` that many programs are run to their end instead. `cap_shares` are
    the limits that `capped` is tuned over, for each workload and load, as shares of the programs
    whose mean contexts fill all KV. `trace` replays the programs of a trace.jsonl as one more
    workload, named `trace`.
    """

    sim_engine: EngineProfile
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    out_dir: str = "runs/sim"
    workloads: list[str] = field(default_factory=lambda: ["short_tools"])
    trace: str | None = None
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    loads: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0])
    seeds: list[int] = field(default_factory=lambda: [0])
    num_backends: int = 2
    warmup_lives: float = 1.0
    measure_lives: float = 2.0
    warmup_s: float = 0.0
    measure_s: float | None = None
    makespan_programs: int | None = None
    bounds: list[str] = field(default_factory=lambda: list(BOUNDS))
    cap_shares: list[float] = field(default_factory=lambda: [0.4, 0.55, 0.7, 0.85, 1.0])
    num_processes: int | None = None  # null: one a core
    plots: bool = True

    def __post_init__(self) -> None:
        for workload in self.workloads:
            if workload not in WORKLOADS:
                raise ConfigError(f"workloads: no workload {workload!r}; it must be one of {', '.join(WORKLOADS)}")
        for policy in self.policies:
            if policy not in POLICIES:
                raise ConfigError(f"policies: no policy {policy!r}; it must be one of {', '.join(POLICIES)}")
        for bound in self.bounds:
            if bound not in BOUNDS:
                raise ConfigError(f"bounds: no bound {bound!r}; it must be one of {', '.join(BOUNDS)}")
        if not (self.workloads or self.trace):
            raise ConfigError("workloads: give at least one, or a trace")
        for name in ("policies", "loads", "seeds", "cap_shares"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: needs at least one value")
        if min(self.loads) <= 0 or min(self.cap_shares) <= 0:
            raise ConfigError("loads, cap_shares: must be > 0")
        if self.warmup_lives < 0 or self.measure_lives <= 0 or self.warmup_s < 0:
            raise ConfigError("measure_lives: must be > 0, and warmup_lives, warmup_s >= 0")
        for name in ("measure_s", "makespan_programs", "num_processes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value!r}: must be > 0, or null")
        if self.num_backends < 1:
            raise ConfigError(f"num_backends={self.num_backends!r}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """Which engine to measure and where to write its profile; `num_engines` of them run at once.

    `model` is a preset of engine.random_model, made on the spot; null: `engine.model`. `profile`
    is taken instead of measuring one. `bench`, a bench.json of `num_engines` such engines, scales it.
    """

    engine: EngineConfig
    model: str | None = "qwen2_3m"
    name: str = "mine"
    out: str = "runs/calibrate/mine.yaml"
    num_engines: int = 1
    repeats: int = 3  # of every measurement; the median counts
    profile: str | None = None
    bench: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_engines", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be at least 1")
