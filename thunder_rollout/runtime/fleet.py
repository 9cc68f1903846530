"""The engines of a run, each an actor in a placement group of its own under a supervisor.

Contract: engines join and leave while the run goes on. One that joins is known to every worker
(`on_join`) before the scheduler may send it a program. One that leaves is down for the scheduler
at once, so its programs go on elsewhere; its turns in flight finish, or move after `drain_s`.
Where a node dies, Ray places the engine on another that has room and the supervisor starts it
there. `supervise` also lets engines join, up to `max_engines`, as the cluster gains room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from thunder_rollout.core.events import BackendDown
from thunder_rollout.engine.actor import create_engine_actor
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError, EngineDied
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.supervisor import EngineSupervisor, SchedulerEvents
from thunder_rollout.runtime.weights import Weights

logger = logging.getLogger(__name__)

JOIN_EVERY_S = 5.0  # how often the cluster is asked for room
PLACE_S = 10.0  # for an engine that joins, where room was seen
DRAIN_POLL_S = 0.2


@dataclass(slots=True, kw_only=True)
class _Member:
    engine: RemoteEngine
    handle: Any
    group: PlacementGroup
    supervisor: EngineSupervisor
    watching: asyncio.Task[None] | None = None


class EngineFleet:
    """`prefix` stands before the engines' names in Ray's logs."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: SchedulerEvents,
        *,
        prefix: str,
        on_join: Callable[[str, Any], Awaitable[None]],
        weights: Weights | None = None,
    ) -> None:
        self.handles: dict[str, Any] = {}  # the actors of all that were ever up, by name
        self._config = config
        self._scheduler = scheduler
        self._prefix = prefix
        self._on_join = on_join
        self._weights = weights
        self._members: dict[str, _Member] = {}
        self._num_made = 0
        self._max_engines = 0
        self._tasks: asyncio.TaskGroup | None = None  # while `supervise` runs

    @property
    def supervisors(self) -> dict[str, EngineSupervisor]:
        return {name: member.supervisor for name, member in self._members.items()}

    async def start(self, num_engines: int) -> None:
        """Start the first engines, side by side; the scheduler hears of them with `announce`."""
        async with task_group() as group:
            starting = [group.create_task(self._launch(self._config.startup_timeout_s)) for _ in range(num_engines)]
        for task in starting:
            await task

    async def announce(self) -> None:
        for supervisor in self.supervisors.values():
            await supervisor.announce()

    async def supervise(self, max_engines: int) -> None:
        """Watch the engines until cancelled, and let others join up to `max_engines`."""
        self._max_engines = max_engines
        async with task_group() as self._tasks:
            for name in list(self._members):
                self._watch(name)
            if max_engines > len(self._members):
                self._tasks.create_task(self._grow(), name="grow")
            await asyncio.Event().wait()

    async def add(self) -> str:
        """Start one more engine and let it join; returns its name. Raises `ConfigError` where no node has
        the room, `EngineDied` where it does not start."""
        name = await self._launch(PLACE_S)
        await self._on_join(name, self.handles[name])
        await self._members[name].supervisor.announce()
        if self._tasks is not None:
            self._watch(name)
        logger.info("backend=%s joined", name)
        return name

    async def remove(self, name: str, *, drain_s: float) -> None:
        """Let an engine leave, and none join in its place. Raises `ConfigError` for an unknown one."""
        member = self._members.pop(name, None)
        if member is None:
            raise ConfigError(f"no engine {name!r} is up; there are: {', '.join(sorted(self._members)) or 'none'}")
        self._max_engines -= 1
        if member.watching is not None:
            member.watching.cancel()
        await self._scheduler.post(
            BackendDown(backend=name, generation=member.supervisor.generation, reason="it leaves the run")
        )
        try:
            async with asyncio.timeout(drain_s):
                await _drained(member.engine)
        except (TimeoutError, EngineDied) as error:
            logger.info("backend=%s leaves with turns in flight: %r", name, error)
        finally:
            await self._discard(member.engine, member.handle, member.group)
        logger.info("backend=%s left", name)

    async def stop(self) -> None:
        await asyncio.gather(*(member.engine.stop() for member in self._members.values()), return_exceptions=True)

    def shutdown(self) -> None:
        """Give up what the engines reserve. Idempotent."""
        while self._members:
            _, member = self._members.popitem()
            if ray.is_initialized():
                remove_placement_group(member.group)

    async def _launch(self, place_s: float) -> str:
        """Each engine samples from a seed of its own: the samples of a group must differ."""
        number, self._num_made = self._num_made, self._num_made + 1
        name, config = f"engine{number}", replace(self._config, seed=self._config.seed + number)
        group = placement_group([config.resources()], strategy="STRICT_PACK")
        handle: Any = None
        try:
            await _placed(group, config, place_s)
            handle = create_engine_actor(config, name=f"{self._prefix}/{name}", placement_group=group)
            engine = RemoteEngine(handle)
            info = await engine.start()
        except BaseException:
            if handle is not None:
                ray.kill(handle)
            remove_placement_group(group)
            raise
        self.handles[name] = handle
        self._members[name] = _Member(
            engine=engine,
            handle=handle,
            group=group,
            supervisor=EngineSupervisor(name, engine, self._scheduler, info, config, self._weights),
        )
        return name

    def _watch(self, name: str) -> None:
        assert self._tasks is not None
        member = self._members[name]
        member.watching = self._tasks.create_task(self._watch_one(name, member), name=f"supervise {name}")

    async def _watch_one(self, name: str, member: _Member) -> None:
        await member.supervisor.run()
        if self._members.pop(name, None) is not None:  # given up
            await self._discard(member.engine, member.handle, member.group)

    async def _discard(self, engine: RemoteEngine, handle: Any, group: PlacementGroup) -> None:
        try:
            async with asyncio.timeout(PLACE_S):
                await engine.stop()
        except TimeoutError:
            logger.warning("an engine did not stop within %.0f s and is killed", PLACE_S)
        ray.kill(handle)
        remove_placement_group(group)

    async def _grow(self) -> None:
        while True:
            await asyncio.sleep(JOIN_EVERY_S)
            if len(self._members) < self._max_engines and await asyncio.to_thread(_has_room, self._config.resources()):
                try:
                    await self.add()
                except (ConfigError, EngineDied) as error:
                    logger.warning("an engine could not join: %s", error)


async def _drained(engine: RemoteEngine) -> None:
    while True:
        if not (await engine.stats()).in_flight:
            return
        await asyncio.sleep(DRAIN_POLL_S)


def _has_room(wanted: dict[str, float]) -> bool:
    free = ray.available_resources()
    return all(free.get(name, 0.0) >= amount for name, amount in wanted.items())


async def _placed(group: PlacementGroup, engine: EngineConfig, place_s: float) -> None:
    """Raises `ConfigError` if no single node has the room for it in time."""
    try:
        async with asyncio.timeout(place_s):
            await group.ready()
    except TimeoutError:
        raise ConfigError(
            f"engine.num_gpus, engine.num_cpus: no node had {engine.resources()} free for an engine within "
            f"{place_s:.0f} s (engine.startup_timeout_s at the start); an engine's GPUs must be on one node"
        ) from None
