"""The engines that cells are measured on, on Ray: started for the first cell that needs them, kept for those
that need the same, replaced for one that doesn't."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from thunder_rollout.bench.plan import CellPlan
from thunder_rollout.engine.actor import check_resources, create_engine_actor
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.protocol import EngineInfo
from thunder_rollout.engine.random_model import RandomModel, write_preset
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    model: str
    configs: tuple[EngineConfig, ...]
    engines: dict[str, RemoteEngine]
    infos: dict[str, EngineInfo]
    vocab_size: int
    folder: Path  # of the model

    @property
    def capacities(self) -> dict[str, int]:
        return {name: info.capacity_tokens for name, info in self.infos.items()}

    async def reset(self) -> None:
        """Empty the caches. Asks the engines' cores: one that hangs does not answer."""
        await asyncio.gather(*(engine.reset_prefix_cache() for engine in self.engines.values()))


class FleetHolder:
    """`folder` takes the models' weights. `release` must be awaited at the end; it is idempotent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, RandomModel] = {}
        self._handles: list[Any] = []
        self._fleet: Fleet | None = None

    async def fleet_for(self, plan: CellPlan) -> Fleet:
        if self._fleet is None or (self._fleet.model, self._fleet.configs) != (plan.key.model, plan.engines):
            await self.release()
            self._fleet = await self._start(plan)
        return self._fleet

    async def release(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.gather(*(engine.stop() for engine in fleet.engines.values()), return_exceptions=True)
        for handle in self._handles:
            ray.kill(handle)
        self._handles.clear()

    async def _start(self, plan: CellPlan) -> Fleet:
        check_resources(plan.engines[0], len(plan.engines), ray.cluster_resources())
        name = plan.key.model
        if name not in self._models:
            self._models[name] = await asyncio.to_thread(write_preset, name, self._folder / name)
        model = self._models[name]
        logger.info(
            "starting %d engines of %s with %s KV tokens",
            len(plan.engines), name, [config.kv_cache_tokens for config in plan.engines],
        )  # fmt: skip
        engines: dict[str, RemoteEngine] = {}
        for number, config in enumerate(plan.engines):
            handle = create_engine_actor(replace(config, model=str(model.path)), name=f"bench/engine{number}")
            self._handles.append(handle)
            engines[f"engine{number}"] = RemoteEngine(handle)
        started = await asyncio.gather(*(engine.start() for engine in engines.values()))
        infos = dict(zip(engines, started, strict=True))
        if sum(info.capacity_tokens for info in started) != plan.capacity_tokens:
            raise ConfigError(
                f"engine.kv_cache_tokens: the engines hold {[info.capacity_tokens for info in started]} tokens, not "
                f"the {plan.capacity_tokens} in all that the plan counts with; give a multiple of engine.block_size"
            )
        return Fleet(
            model=name,
            configs=plan.engines,
            engines=engines,
            infos=infos,
            vocab_size=model.vocab_size,
            folder=model.path,
        )


@contextlib.asynccontextmanager
async def scheduler_for(plan: CellPlan, fleet: Fleet) -> AsyncIterator[tuple[RemoteScheduler, list[EngineSupervisor]]]:
    """A fresh scheduler actor that knows the fleet, whose caches are empty, and what watches its engines."""
    await fleet.reset()
    handle = create_scheduler_actor(plan.scheduler, trace_path=None, hosts=None)
    scheduler = RemoteScheduler(handle)
    try:
        await scheduler.start()
        supervisors = [
            EngineSupervisor(name, engine, scheduler, fleet.infos[name], plan.engines[0])
            for name, engine in fleet.engines.items()
        ]
        for supervisor in supervisors:
            await supervisor.announce()
        yield scheduler, supervisors
    finally:
        await scheduler.stop()
        ray.kill(handle)
