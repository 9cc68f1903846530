"""`RemoteEngine`: the engine Protocol on an engine actor's handle."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation
from thunder_rollout.engine.weights import MemoryWeights, UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied
from thunder_rollout.remote import remote_call

UNAVAILABLE_POLL_S = 0.5


class RemoteEngine:
    """Picklable, so that it can be handed to other actors. A dead actor is `EngineDied`; cancelling
    a call cancels it in the actor, which aborts the turn. `start` may come again (`EngineHost`)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def start(self) -> EngineInfo:
        """Waits while Ray makes the actor anew, for as long as no node has room for it."""
        while True:
            try:
                info: EngineInfo = await self._call(self._handle.start.remote())
                return info
            except EngineDied as error:
                if not isinstance(error.__cause__, ActorUnavailableError):
                    raise
            await asyncio.sleep(UNAVAILABLE_POLL_S)

    async def generate(self, request: GenerateRequest) -> Generation:
        generation: Generation = await self._call(self._handle.generate.remote(request))
        return generation

    async def abort(self, request_id: str) -> None:
        await self._call(self._handle.abort.remote(request_id))

    async def stats(self) -> EngineStats:
        stats: EngineStats = await self._call(self._handle.stats.remote())
        return stats

    async def reset_prefix_cache(self) -> None:
        await self._call(self._handle.reset_prefix_cache.remote())

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        changes: CacheChanges | None = await self._call(self._handle.cache_changes.remote(whole=whole))
        return changes

    def kill(self) -> None:
        """End the actor's process, whatever state it is in; Ray makes it anew."""
        ray.kill(self._handle, no_restart=False)

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        """`source` may be what `shared` returned."""
        await self._call(self._handle.update_weights.remote(source, version, mode))

    async def stop(self) -> None:
        """Idempotent also where the actor is gone."""
        with contextlib.suppress(EngineDied):
            await self._call(self._handle.stop.remote())

    async def _call(self, ref: Any) -> Any:
        return await remote_call(ref, died=EngineDied, what="the engine actor")


def shared(source: WeightSource) -> Any:
    """The source as an object of Ray's store where it is large, so that any number of engines read one copy."""
    return ray.put(source) if isinstance(source, MemoryWeights) else source
