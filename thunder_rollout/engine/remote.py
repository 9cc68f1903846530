"""`RemoteEngine`: the engine Protocol on an engine actor's handle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, UpdateMode, WeightSource
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

    async def check_weights(self, source: WeightSource) -> None:
        """`source` as for `update_weights`."""
        await self._call(self._handle.check_weights.remote(source))

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        """`source` must be what `shared` returned, or small."""
        await self._call(self._handle.update_weights.remote(source, version, mode))

    async def stop(self) -> None:
        """Idempotent also where the actor is gone."""
        with contextlib.suppress(EngineDied):
            await self._call(self._handle.stop.remote())

    async def _call(self, ref: Any) -> Any:
        return await remote_call(ref, died=EngineDied, what="the engine actor")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBucket:
    """A bucket of weights in Ray's object store, where any number of engines read one copy; it is there for as
    long as somebody has this."""

    ref: Any

    @classmethod
    def put(cls, image: Any) -> SharedBucket:
        return cls(ref=ray.put(image))

    def fetch(self) -> Any:
        return ray.get(self.ref)


def shared(source: WeightSource | Mapping[str, Any], *, bucket_bytes: int) -> WeightSource:
    """As engines elsewhere can take it; tensors go to Ray's store, `bucket_bytes` at a time. Blocks."""
    if isinstance(source, FolderWeights):
        return source
    if isinstance(source, MemoryWeights):
        return replace(source, buckets=tuple(SharedBucket.put(bucket.fetch()) for bucket in source.buckets))
    return MemoryWeights.of(source, bucket_bytes=bucket_bytes, keep=SharedBucket.put)
