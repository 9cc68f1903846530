"""Watches one engine of a run and tells the scheduler what it sees.

Contract: `announce` first, then `run` reports every `report_s` until it is cancelled. Whatever a
report needs of the engine is fetched in `_report`, in one place.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from thunder_rollout.core.events import BackendDown, BackendStats, BackendUp, Event
from thunder_rollout.engine.protocol import Engine, EngineInfo
from thunder_rollout.errors import EngineDied


class EventPort(Protocol):
    async def post(self, event: Event) -> None: ...


class EngineSupervisor:
    """`info` is what the started engine said of itself."""

    def __init__(self, name: str, engine: Engine, scheduler: EventPort, info: EngineInfo, *, report_s: float) -> None:
        self.name = name
        self.info = info
        self._engine = engine
        self._scheduler = scheduler
        self._report_s = report_s
        self._generation = 0

    async def announce(self) -> None:
        """From here on the scheduler may send it programs."""
        await self._scheduler.post(
            BackendUp(
                backend=self.name,
                generation=self._generation,
                capacity_tokens=self.info.capacity_tokens,
                max_running=self.info.max_running,
                block_size=self.info.block_size,
                offload_tokens=self.info.offload_tokens,
            )
        )

    async def run(self) -> None:
        """Until cancelled, or until the engine is dead."""
        try:
            while True:
                await asyncio.sleep(self._report_s)
                await self._report()
        except EngineDied as error:
            await self._scheduler.post(BackendDown(backend=self.name, generation=self._generation, reason=str(error)))

    async def _report(self) -> None:
        stats = await self._engine.stats()
        await self._scheduler.post(
            BackendStats(
                backend=self.name,
                generation=self._generation,
                used_tokens=stats.used_tokens,
                running=stats.running,
                waiting=stats.waiting,
            )
        )
