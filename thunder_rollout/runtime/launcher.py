"""Where a fleet's engines come from: each an actor on Ray in a placement group of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from thunder_rollout.engine.actor import create_engine_actor
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.protocol import EngineInfo
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.supervisor import RestartableEngine


class FleetEngine(RestartableEngine, Protocol):
    async def stop(self) -> None: ...


class Launched(Protocol):
    """A started engine; `handle` is what others reach it by."""

    @property
    def engine(self) -> FleetEngine: ...

    @property
    def handle(self) -> Any: ...

    @property
    def info(self) -> EngineInfo: ...

    def free(self) -> None:
        """End it, and give up what it reserves. Idempotent."""


class EngineLauncher(Protocol):
    async def launch(self, name: str, config: EngineConfig, *, place_s: float) -> Launched:
        """Raises `ConfigError` if no single node has the room for it within `place_s`, `EngineDied` where it
        does not start; nothing of it is left then."""

    async def has_room(self, config: EngineConfig) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RayLaunched:
    engine: RemoteEngine
    handle: Any
    info: EngineInfo
    group: PlacementGroup

    def free(self) -> None:
        if ray.is_initialized():
            ray.kill(self.handle)
            remove_placement_group(self.group)


class RayLauncher:
    """`prefix` stands before the engines' names in Ray's logs."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    async def launch(self, name: str, config: EngineConfig, *, place_s: float) -> Launched:
        group = placement_group([config.resources()], strategy="STRICT_PACK")
        handle: Any = None
        try:
            await _placed(group, config, place_s)
            handle = create_engine_actor(config, name=f"{self._prefix}/{name}", placement_group=group)
            engine = RemoteEngine(handle)
            return RayLaunched(engine=engine, handle=handle, info=await engine.start(), group=group)
        except BaseException:
            if handle is not None:
                ray.kill(handle)
            remove_placement_group(group)
            raise

    async def has_room(self, config: EngineConfig) -> bool:
        free = await asyncio.to_thread(ray.available_resources)
        return all(free.get(name, 0.0) >= amount for name, amount in config.resources().items())


async def _placed(group: PlacementGroup, engine: EngineConfig, place_s: float) -> None:
    try:
        async with asyncio.timeout(place_s):
            await group.ready()
    except TimeoutError:
        raise ConfigError(
            f"engine.num_gpus, engine.num_cpus: no node had {engine.resources()} free for an engine within "
            f"{place_s:.0f} s (engine.startup_timeout_s at the start); an engine's GPUs must be on one node"
        ) from None
