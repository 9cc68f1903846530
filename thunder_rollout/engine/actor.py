"""The Ray actor that hosts one engine; thin: everything is the engine's."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.config import EngineConfig, check_resources
from thunder_rollout.engine.factory import create_engine
from thunder_rollout.engine.host import EngineHost
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation
from thunder_rollout.engine.weights import UpdateMode, WeightSource

__all__ = ["EngineActor", "check_resources", "create_engine_actor"]

# Every turn in flight holds one call; vLLM queues by itself, so none should wait before it.
MAX_CONCURRENCY = 10_000


class EngineActor:
    """`EngineHost`, one async method each. Ray restarts a dead actor, without its engine: `start` it."""

    def __init__(self, config: EngineConfig, name: str) -> None:
        self._name = name
        self._engine = EngineHost(lambda: create_engine(config), hang_s=config.hang_s)

    def __repr__(self) -> str:
        return self._name  # Ray's prefix of its log lines

    async def pid(self) -> int:
        return os.getpid()

    async def start(self) -> EngineInfo:
        return await self._engine.start()

    async def generate(self, request: GenerateRequest) -> Generation:
        return await self._engine.generate(request)

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def reset_prefix_cache(self) -> None:
        await self._engine.reset_prefix_cache()

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        return await self._engine.cache_changes(whole=whole)

    async def check_weights(self, source: WeightSource) -> None:
        await self._engine.check_weights(source)

    async def update_weights(self, source: WeightSource, version: str, mode: UpdateMode) -> None:
        await self._engine.update_weights(source, version=version, mode=mode)

    async def stop(self) -> None:
        await self._engine.stop()


def create_engine_actor(
    config: EngineConfig, *, name: str, placement_group: Any | None = None, bundle_index: int = 0
) -> Any:
    """Create the actor (its engine is started by its `start`); returns the handle.

    The actor reserves `config.resources()`, in `placement_group`'s bundle where one is given. All of
    a vLLM engine's GPUs belong to the actor, so they are on its node. `name` stands in its logs.
    """
    options: dict[str, Any] = {
        "num_cpus": config.num_cpus,
        "num_gpus": config.gpus,
        "max_concurrency": MAX_CONCURRENCY,
        "max_restarts": -1,
        "runtime_env": {"env_vars": config.environment()},
    }
    if placement_group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group, placement_group_bundle_index=bundle_index, placement_group_capture_child_tasks=True
        )
    return ray.remote(EngineActor).options(**options).remote(config, name)
