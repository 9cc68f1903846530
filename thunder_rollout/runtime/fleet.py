"""The engines of a run, each under a supervisor.

Contract: engines join and leave while the run goes on. One that joins is known to every worker
(`on_join`) before the scheduler may send it a program; one that can't join leaves nothing behind. One
that leaves is down for the scheduler at once, so its programs go on elsewhere; its turns in flight
finish, or move after `drain_s`. Where a node dies, the launcher places the engine on another that has
room and the supervisor starts it there. `supervise` also lets engines join, in the place of those that
were given up and, up to `max_engines`, as the cluster gains room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from thunder_rollout.core.events import BackendDown
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.errors import BadEvent, ConfigError, EngineDied, UserError
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.launcher import EngineLauncher, FleetEngine, Launched, RayLauncher
from thunder_rollout.runtime.supervisor import MAX_BACKOFF_S, EngineSupervisor, SchedulerEvents
from thunder_rollout.runtime.weights import Weights

logger = logging.getLogger(__name__)

JOIN_EVERY_S = 5.0  # how often the cluster is asked for room
PLACE_S = 10.0  # for an engine that joins, where room was seen
DRAIN_POLL_S = 0.2


@dataclass(slots=True, kw_only=True)
class _Member:
    launched: Launched
    supervisor: EngineSupervisor
    watching: asyncio.Task[None] | None = None


class EngineFleet:
    """`prefix` stands before the engines' names in the logs of Ray, where `launcher` is not another."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: SchedulerEvents,
        *,
        prefix: str,
        on_join: Callable[[str, Any], Awaitable[None]],
        weights: Weights | None = None,
        launcher: EngineLauncher | None = None,
    ) -> None:
        self.handles: dict[str, Any] = {}  # of all that were ever up, by name
        self._config = config
        self._scheduler = scheduler
        self._on_join = on_join
        self._weights = weights
        self._launcher = launcher if launcher is not None else RayLauncher(prefix)
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
            for _ in range(num_engines):
                group.create_task(self._start_one())

    async def announce(self) -> None:
        for supervisor in self.supervisors.values():
            await supervisor.announce()

    async def supervise(self, max_engines: int) -> None:
        """Watch the engines until cancelled, and let others join up to `max_engines`."""
        self._max_engines = max_engines
        async with task_group() as self._tasks:
            for name in list(self._members):
                self._watch(name)
            self._tasks.create_task(self._grow(), name="grow")
            await asyncio.Event().wait()

    async def add(self) -> str:
        """Start one more engine and let it join; returns its name. Raises `ConfigError` where no node has
        the room, `EngineDied` where it does not start, `WeightsRefused` where it can't load what the run serves."""
        name, member = await self._launch(PLACE_S)
        self.handles[name] = member.launched.handle  # a worker that is made from here on knows it
        try:
            await self._on_join(name, member.launched.handle)
            await member.supervisor.announce()
        except BaseException:
            del self.handles[name]
            await asyncio.shield(self._turn_away(name, member))
            raise
        self._members[name] = member
        self._max_engines = max(self._max_engines, len(self._members))
        if self._tasks is not None:
            self._watch(name)
        logger.info("backend=%s joined", name)
        return name

    async def remove(self, name: str, *, drain_s: float) -> None:
        """Let an engine leave, and none join in its place, nor any that was still to join. Raises `ConfigError` for
        an unknown one."""
        member = self._members.pop(name, None)
        if member is None:
            raise ConfigError(f"no engine {name!r} is up; there are: {', '.join(sorted(self._members)) or 'none'}")
        self._max_engines = min(self._max_engines - 1, len(self._members))
        if member.watching is not None:
            member.watching.cancel()
        await self._down(name, member, "it leaves the run")
        try:
            async with asyncio.timeout(drain_s):
                await _drained(member.launched.engine)
        except (TimeoutError, EngineDied) as error:
            logger.info("backend=%s leaves with turns in flight: %r", name, error)
        finally:
            await _discard(member.launched)
        logger.info("backend=%s left", name)

    async def stop(self) -> None:
        engines = [member.launched.engine for member in self._members.values()]
        await asyncio.gather(*(engine.stop() for engine in engines), return_exceptions=True)

    def shutdown(self) -> None:
        """Give up what the engines reserve. Idempotent."""
        while self._members:
            _, member = self._members.popitem()
            member.launched.free()

    async def _start_one(self) -> None:
        name, member = await self._launch(self._config.startup_timeout_s)
        self.handles[name] = member.launched.handle
        self._members[name] = member

    async def _launch(self, place_s: float) -> tuple[str, _Member]:
        """Each engine samples from a seed of its own: the samples of a group must differ."""
        number, self._num_made = self._num_made, self._num_made + 1
        name, config = f"engine{number}", replace(self._config, seed=self._config.seed + number)
        launched = await self._launcher.launch(name, config, place_s=place_s)
        supervisor = EngineSupervisor(name, launched.engine, self._scheduler, launched.info, config, self._weights)
        return name, _Member(launched=launched, supervisor=supervisor)

    async def _turn_away(self, name: str, member: _Member) -> None:
        """It could not join; the scheduler may have heard of it all the same."""
        try:
            with contextlib.suppress(BadEvent):
                await self._down(name, member, "it could not join the run")
        finally:
            await _discard(member.launched)

    async def _down(self, name: str, member: _Member, why: str) -> None:
        await self._scheduler.post(BackendDown(backend=name, generation=member.supervisor.generation, reason=why))

    def _watch(self, name: str) -> None:
        assert self._tasks is not None
        member = self._members[name]
        member.watching = self._tasks.create_task(self._watch_one(name, member), name=f"supervise {name}")

    async def _watch_one(self, name: str, member: _Member) -> None:
        await member.supervisor.run()
        if self._members.pop(name, None) is not None:  # given up
            await _discard(member.launched)

    async def _grow(self) -> None:
        pause_s = JOIN_EVERY_S
        while True:
            await asyncio.sleep(pause_s)
            if len(self._members) >= self._max_engines or not await self._launcher.has_room(self._config):
                continue
            try:
                await self.add()
            except (UserError, EngineDied) as error:
                pause_s = min(2 * pause_s, MAX_BACKOFF_S)
                logger.warning("an engine could not join: %s; next try in %.0f s", error, pause_s)
            else:
                pause_s = JOIN_EVERY_S


async def _discard(launched: Launched) -> None:
    try:
        async with asyncio.timeout(PLACE_S):
            await launched.engine.stop()
    except TimeoutError:
        logger.warning("an engine did not stop within %.0f s and is killed", PLACE_S)
    finally:
        launched.free()


async def _drained(engine: FleetEngine) -> None:
    while True:
        if not (await engine.stats()).in_flight:
            return
        await asyncio.sleep(DRAIN_POLL_S)
