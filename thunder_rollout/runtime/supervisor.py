"""Watches one engine of a run: reports what it holds, finds it dead, starts it again.

Contract: `announce` first, then `run` until it is cancelled or the engine is given up. Every
`report_s` the engine is asked for its statistics. An engine that is dead (`EngineHost` says when),
or that does not answer for `hang_s`, is down for the scheduler at once and started again under the
next generation, with the weights that the run serves by then. A start that fails, or takes longer
than `startup_timeout_s`, is tried again after a pause that doubles. After `max_restarts` starts in
a row that led to no step of work the engine is given up, and `run` returns; the scheduler then
fails who waits, if no other engine is up or returning.

Programs need nothing of this: their turns raise `EngineDied` and are asked again. Where only they
lost sight of the engine, which still answers when it is asked after their report, it is announced
again under the next generation without a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import nullcontext
from typing import Protocol, TypeVar

from thunder_rollout.core.events import BackendDown, BackendStats, BackendUp, Event
from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.protocol import EngineInfo, EngineStats
from thunder_rollout.errors import EngineDied, UserError
from thunder_rollout.runtime.weights import Weights, WeightsTaker

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 60.0


class RestartableEngine(WeightsTaker, Protocol):
    """`EngineHost` behind a handle: `RemoteEngine`."""

    async def start(self) -> EngineInfo: ...

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None: ...

    def kill(self) -> None:
        """End its process, whatever state it is in; `start` then begins in a new one."""


class SchedulerEvents(Protocol):
    async def post(self, event: Event) -> None: ...

    async def report(self, stats: BackendStats) -> bool: ...


class EngineSupervisor:
    """`info` is what the started engine said of itself; `weights` are those that the run serves now."""

    def __init__(
        self,
        name: str,
        engine: RestartableEngine,
        scheduler: SchedulerEvents,
        info: EngineInfo,
        config: EngineConfig,
        weights: Weights | None = None,
    ) -> None:
        self.name = name
        self.info = info
        self.generation = 0
        self.num_restarts = 0
        self._engine = engine
        self._scheduler = scheduler
        self._config = config
        self._num_in_a_row = 0
        self._cache_told_of: int | None = None  # the generation whose cache the scheduler knows
        self._weights = weights

    async def announce(self) -> None:
        """Bring it to the run's weights; from here on the scheduler may send it programs."""
        await self._announce(self.generation)

    async def _announce(self, generation: int) -> None:
        async with self._weights.load_into(self.name, self._engine) if self._weights is not None else nullcontext():
            self.generation = generation
            await self._post_up()

    async def _post_up(self) -> None:
        await self._scheduler.post(
            BackendUp(
                backend=self.name,
                generation=self.generation,
                capacity_tokens=self.info.capacity_tokens,
                max_running=self.info.max_running,
                block_size=self.info.block_size,
                offload_tokens=self.info.offload_tokens,
                releases=self.info.releases,
            )
        )

    async def run(self) -> None:
        """Until cancelled, or until the engine is given up."""
        while True:
            await asyncio.sleep(self._config.report_s)
            try:
                stats = await self.stats()
                cache = await self._answer(self._engine.cache_changes(whole=self._cache_told_of != self.generation))
                await self._report(stats, cache)
            except EngineDied as error:
                if not await self._restart(error):
                    return

    async def stats(self) -> EngineStats:
        """Raises `EngineDied` also for an engine that does not answer, and kills it."""
        return await self._answer(self._engine.stats())

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._config.hang_s):
                return await call
        except TimeoutError:
            self._engine.kill()
            raise EngineDied(f"{self.name} did not answer for {self._config.hang_s:g} s") from None

    async def _report(self, stats: EngineStats, cache: CacheChanges | None) -> None:
        if stats.num_steps:
            self._num_in_a_row = 0
        is_up = await self._scheduler.report(
            BackendStats(
                backend=self.name,
                generation=self.generation,
                used_tokens=stats.used_tokens,
                running=stats.running,
                waiting=stats.waiting,
                stored=cache.stored if cache is not None else None,
                removed=cache.removed if cache is not None else (),
                whole=cache is not None and cache.whole,
            )
        )
        self._cache_told_of = self.generation if cache is not None else None
        if not is_up:
            await self.stats()  # whose turns found it dead after it was asked, says so now
            logger.warning("backend=%s lives, but a program lost sight of it; it is announced again", self.name)
            await self._announce_next()

    async def _restart(self, error: EngineDied) -> bool:
        """Whether the engine is up again."""
        logger.warning("backend=%s generation=%d died: %s", self.name, self.generation, error)
        await self._down(error, returning=True)
        last: Exception = error
        pause_s = 1.0
        while self._num_in_a_row < self._config.max_restarts:
            self._num_in_a_row += 1
            try:
                async with asyncio.timeout(self._config.startup_timeout_s):
                    self.info = await self._engine.start()
                    await self._announce_next()
            except (EngineDied, UserError, TimeoutError) as failure:
                if isinstance(failure, TimeoutError):
                    self._engine.kill()
                last = failure
                logger.warning("backend=%s did not start again: %r; next try in %.0f s", self.name, failure, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_BACKOFF_S)
                continue
            self.num_restarts += 1
            logger.warning("backend=%s generation=%d is up again", self.name, self.generation)
            return True
        logger.error("backend=%s is given up after %d restarts: %s", self.name, self._num_in_a_row, last)
        await self._down(last, returning=False)
        return False

    async def _announce_next(self) -> None:
        await self._announce(self.generation + 1)

    async def _down(self, why: Exception, *, returning: bool) -> None:
        await self._scheduler.post(
            BackendDown(backend=self.name, generation=self.generation, reason=str(why), returning=returning)
        )
