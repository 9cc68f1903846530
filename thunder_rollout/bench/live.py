"""`thunder-rollout bench`: policies against each other on real engines, in one run.

The engines start once; every cell begins with empty caches and a fresh scheduler actor. Policies
take turns within a load, so that whatever drifts on the machine drifts for all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from thunder_rollout.bench.cell import Cell, CellResult
from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.workload import longest_context_tokens, mean_context_tokens
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.engine.actor import check_resources, create_engine_actor
from thunder_rollout.engine.protocol import EngineInfo
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError
from thunder_rollout.observe.console import table_console
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.cluster import start_ray
from thunder_rollout.runtime.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

_TABLE_WIDTH = 150


async def run_bench(config: BenchConfig) -> list[CellResult]:
    """Run every cell, write `runs/bench/bench.json` after each and return the rows."""
    start_ray(config.ray)
    check_resources(config.engine, config.num_engines, ray.cluster_resources())
    folder = Path(config.runs_dir) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="thunder-bench-") as scratch:
        model = await asyncio.to_thread(write_preset, config.model, Path(scratch) / config.model)
        engine = replace(config.engine, model=str(model.path))
        handles = [
            create_engine_actor(replace(engine, seed=engine.seed + i), name=f"bench/engine{i}")
            for i in range(config.num_engines)
        ]
        bench = _Bench(config, {f"engine{i}": RemoteEngine(h) for i, h in enumerate(handles)}, model.vocab_size)
        try:
            return await bench.run(folder / "bench.json")
        finally:
            await asyncio.gather(*(engine.stop() for engine in bench.engines.values()), return_exceptions=True)
            ray.shutdown()


class _Bench:
    def __init__(self, config: BenchConfig, engines: dict[str, RemoteEngine], vocab_size: int) -> None:
        self.config = config
        self.engines = engines
        self._vocab_size = vocab_size
        self._infos: dict[str, EngineInfo] = {}
        self._max_programs = config.scheduler.capped.max_programs

    async def run(self, path: Path) -> list[CellResult]:
        infos = await asyncio.gather(*(engine.start() for engine in self.engines.values()))
        self._infos = dict(zip(self.engines, infos, strict=True))
        self._check_capacity()
        if "capped" in self.config.policies + self.config.extra_policies:
            self._max_programs = await self._sweep_cap()
        results: list[CellResult] = []
        for policy, load, seed in _cells(self.config):
            results.append(await self._run_cell(policy, load, seed, self._max_programs))
            path.write_text(json.dumps([asdict(row) for row in results], indent=2) + "\n")
        return results

    async def _sweep_cap(self) -> int:
        """The static limit with the most steps/min at the highest load: what a careful user finds."""
        fits = self._capacity_tokens / mean_context_tokens(self.config.workload)
        load, seed = max(self.config.loads), self.config.seeds[0]
        rates: dict[int, float] = {}
        for share in self.config.cap_shares:
            cap = max(1, round(share * fits))
            if cap not in rates:
                rates[cap] = (await self._run_cell("capped", load, seed, cap)).steps_per_min
        best = max(rates, key=lambda cap: rates[cap])
        logger.info("capped: %s steps/min by limit; the limit is %d programs", rates, best)
        return best

    async def _run_cell(self, policy: str, load: float, seed: int, max_programs: int) -> CellResult:
        config = self.config
        scheduler_config = self._scheduler_config(policy, max_programs)
        await asyncio.gather(*(engine.reset_prefix_cache() for engine in self.engines.values()))
        handle = create_scheduler_actor(scheduler_config, trace_path=None, hosts=[])
        scheduler = RemoteScheduler(handle)
        await scheduler.start()
        supervisors = [
            EngineSupervisor(name, self.engines[name], scheduler, info, config.engine)
            for name, info in self._infos.items()
        ]
        for supervisor in supervisors:
            await supervisor.announce()
        cell = Cell(
            workload=config.workload,
            policy=policy,
            load=load,
            seed=seed,
            num_programs=max(1, round(load * self._capacity_tokens / mean_context_tokens(config.workload))),
            vocab_size=self._vocab_size,
            warmup_s=config.warmup_s,
            measure_s=config.measure_s,
            max_programs=max_programs if policy == "capped" else None,
        )
        block_size = next(iter(self._infos.values())).block_size if scheduler_config.uses_block_hashes else None
        try:
            async with task_group() as group:
                watching = [group.create_task(supervisor.run()) for supervisor in supervisors]
                result = await cell.run(
                    scheduler, self.engines, capacity_tokens=self._capacity_tokens, block_size=block_size
                )
                for watcher in watching:
                    watcher.cancel()
        finally:
            await scheduler.stop()
            ray.kill(handle)
        logger.info(
            "%s at load %.3g (%d programs): %.0f steps/min, hits %.2f",
            policy, load, cell.num_programs, result.steps_per_min, result.kv_hit_rate,
        )  # fmt: skip
        return result

    def _scheduler_config(self, policy: str, max_programs: int) -> SchedulerConfig:
        scheduler = self.config.scheduler
        return replace(scheduler, policy=policy, capped=replace(scheduler.capped, max_programs=max_programs))

    @property
    def _capacity_tokens(self) -> int:
        return sum(info.capacity_tokens for info in self._infos.values())

    def _check_capacity(self) -> None:
        longest = longest_context_tokens(self.config.workload)
        for name, info in self._infos.items():
            if longest > min(info.capacity_tokens, info.max_model_len):
                raise ConfigError(
                    f"workload: a context may reach {longest} tokens, more than {name} bears "
                    f"(engine.kv_cache_tokens {info.capacity_tokens}, engine.max_model_len {info.max_model_len})"
                )


def _cells(config: BenchConfig) -> Iterator[tuple[str, float, int]]:
    for seed in config.seeds:
        for load in sorted({*config.loads, *config.extra_loads}):
            policies = config.policies if load in config.loads else []
            extra = config.extra_policies if load in config.extra_loads else []
            for policy in (*policies, *extra):
                yield policy, load, seed


def print_table(results: list[CellResult], console: Console | None = None) -> None:
    """The table, one line a cell."""
    console = table_console(console, _TABLE_WIDTH)
    table = Table(title="thunder-rollout bench")
    columns = ("workload", "load", "programs", "policy", "steps/min", "KV hits", "latency p50 s", "p95 s", "imbalance")
    terms = ("decode", "prefill", "recompute", "unused", "caching")
    for name in (*columns, *terms):
        table.add_column(name, justify="left" if name in ("workload", "policy") else "right")
    for row in results:
        table.add_row(
            row.workload,
            f"{row.load:g}",
            str(row.num_programs),
            row.policy,
            f"{row.steps_per_min:.0f}",
            f"{row.kv_hit_rate:.2f}",
            f"{row.turn_latency_p50_s:.2f}",
            f"{row.turn_latency_p95_s:.2f}",
            f"{row.imbalance:.2f}",
            *(f"{row.cost_shares[term]:.2f}" for term in terms),
        )
    console.print(table)
