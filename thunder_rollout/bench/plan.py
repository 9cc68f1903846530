"""From the configuration to the cells of a run, in the order in which they are measured.

The order serves a run that is stopped early: the first repetition of every cell, then the second, ... Within
one, as the plan lists them; every other repetition goes backwards, so that whatever drifts on the machine
weighs on no policy alone, and engines of one kind are started once for two repetitions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

from thunder_rollout import __version__
from thunder_rollout.bench.config import BenchConfig, CellsConfig, WorkloadConfig
from thunder_rollout.bench.workload import longest_context_tokens, mean_context_tokens
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import ConfigError

_NOT_SETTINGS = ("model", "seed", "startup_timeout_s", "log_level", "num_cpus")  # of an engine: no matter here


@dataclass(frozen=True, slots=True, kw_only=True)
class CellKey:
    """What names a row of bench.json; `settings` is a digest of all else of the configuration that a cell was run
    with, and of the package's version."""

    workload: str
    model: str
    load: float
    policy: str
    seed: int
    settings: str

    @property
    def kind(self) -> CellKey:
        """The same for all repetitions of a cell, and for no other."""
        return replace(self, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellPlan:
    """`engines` are as they are to be started, but for the model's folder; `max_programs` is of `capped`."""

    key: CellKey
    workload: WorkloadConfig
    scheduler: SchedulerConfig
    engines: tuple[EngineConfig, ...]
    num_programs: int
    warmup_s: float
    measure_s: float
    max_programs: int | None

    @property
    def capacity_tokens(self) -> int:
        return sum(_capacity_tokens(engine) for engine in self.engines)

    @property
    def smallest_tokens(self) -> int:
        return min(_capacity_tokens(engine) for engine in self.engines)


def planned_cells(config: BenchConfig) -> list[CellPlan]:
    """Raises `ConfigError` where nothing is left of the plan, or a program can't fit an engine."""
    entries = [entry for cells in config.plan.cells if (entry := _narrowed(cells, config)) is not None]
    if not entries:
        raise ConfigError(
            f"plan {config.plan.name}: no cell is left; workloads, policies and loads must name some of its own"
        )
    found: dict[CellKey, CellPlan] = {}
    for repetition in range(max(len(entry.seeds) for entry in entries)):
        cells = [cell for entry in entries for cell in _repetition(entry, repetition, config)]
        for cell in cells if repetition % 2 == 0 else reversed(cells):
            found.setdefault(cell.key, cell)
    _check_names(found)
    return list(found.values())


def whole_plan(config: BenchConfig) -> set[CellKey]:
    """The kinds of cells of the plan, those included that `config` leaves out."""
    return {plan.key.kind for plan in planned_cells(replace(config, workloads=None, policies=None, loads=None))}


def _check_names(keys: Iterable[CellKey]) -> None:
    """Who reads the report must know by its columns which cell a line is."""
    names = Counter((key.model, key.workload, key.load, key.policy, key.seed) for key in keys)
    (name, number), *_ = names.most_common(1)
    if number > 1:
        model, workload, load, policy, seed = name
        raise ConfigError(
            f"plan.cells: {number} of them measure {policy} on {workload}, {model}, load {load:g}, seed {seed}, with "
            "other settings; give each a workload of another name, or run them one after the other (runs_dir=...)"
        )


def _narrowed(cells: CellsConfig, config: BenchConfig) -> CellsConfig | None:
    if config.workloads is not None and cells.workload not in config.workloads:
        return None
    policies = [policy for policy in cells.policies if config.policies is None or policy in config.policies]
    loads = [load for load in cells.loads if config.loads is None or load in config.loads]
    if not policies or not loads:
        return None
    return replace(
        cells,
        policies=policies,
        loads=loads,
        seeds=cells.seeds if config.seeds is None else config.seeds,
        warmup_s=cells.warmup_s if config.warmup_s is None else config.warmup_s,
        measure_s=cells.measure_s if config.measure_s is None else config.measure_s,
    )


def _repetition(cells: CellsConfig, number: int, config: BenchConfig) -> Iterator[CellPlan]:
    if number >= len(cells.seeds):
        return
    workload = replace(config.workload[cells.workload], name=cells.workload)
    engines = _engines(cells, workload, config)
    _check_capacity(workload, engines)
    fits = sum(map(_capacity_tokens, engines)) / mean_context_tokens(workload)
    for load in cells.loads:
        for policy in cells.policies:
            scheduler = replace(config.scheduler, policy=policy)
            max_programs = None
            if policy == "capped":
                max_programs = max(1, round(cells.cap_share * fits))
                scheduler = replace(scheduler, capped=replace(scheduler.capped, max_programs=max_programs))
            yield CellPlan(
                key=CellKey(
                    workload=workload.name,
                    model=cells.model,
                    load=load,
                    policy=policy,
                    seed=cells.seeds[number],
                    settings=_digest(cells, workload, engines, scheduler, config.rehearsal_lives),
                ),
                workload=workload,
                scheduler=scheduler,
                engines=engines,
                num_programs=max(1, round(load * fits)),
                warmup_s=cells.warmup_s,
                measure_s=cells.measure_s,
                max_programs=max_programs,
            )


def _engines(cells: CellsConfig, workload: WorkloadConfig, config: BenchConfig) -> tuple[EngineConfig, ...]:
    whole = cells.kv_cache_tokens or config.engine.kv_cache_tokens
    assert whole is not None
    shares = workload.kv_shares
    return tuple(
        replace(
            config.engine,
            kv_cache_tokens=round(whole * shares[number % len(shares)]),
            seed=config.engine.seed + number,
        )
        for number in range(config.num_engines)
    )


def _capacity_tokens(engine: EngineConfig) -> int:
    assert engine.num_kv_blocks is not None
    return engine.num_kv_blocks * engine.block_size


def _check_capacity(workload: WorkloadConfig, engines: tuple[EngineConfig, ...]) -> None:
    longest = longest_context_tokens(workload)
    for engine in engines:
        if longest > min(_capacity_tokens(engine), engine.max_model_len or longest):
            raise ConfigError(
                f"workload.{workload.name}: a context may reach {longest} tokens, more than an engine bears "
                f"(kv_cache_tokens {_capacity_tokens(engine)}, max_model_len {engine.max_model_len}); "
                "lower max_context_tokens"
            )


def _digest(
    cells: CellsConfig,
    workload: WorkloadConfig,
    engines: tuple[EngineConfig, ...],
    scheduler: SchedulerConfig,
    rehearsal_lives: float,
) -> str:
    settings = {
        "version": __version__,
        "workload": asdict(workload),
        "engines": [
            {name: value for name, value in asdict(engine).items() if name not in _NOT_SETTINGS} for engine in engines
        ],
        "scheduler": asdict(scheduler),
        "windows": [cells.warmup_s, cells.measure_s, rehearsal_lives],
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
