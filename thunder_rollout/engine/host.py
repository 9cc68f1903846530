"""One engine after another in one process; the newest serves.

Contract: `start` makes and starts a new engine and ends the one before, also one that hangs. From
the moment an engine is known to be dead, every call of its turns raises `EngineDied` with the
reason, and so does every later call until the next `start`. It is dead when
- it says so,
- it holds turns and made no step for `hang_s` (seen by `stats`, so ask it often), or
- it gave a result that can't be (`engine.result_check`).

`EngineDied.by_turn` says whether the turn may be the cause: it ran when the engine failed at its
work, or the impossible result was its own. A turn that was once under such suspicion
(`GenerateRequest.suspect`) runs alone, so that a second death can have no other cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from thunder_rollout.engine.cache_report import CacheChanges
from thunder_rollout.engine.giving_up import unless
from thunder_rollout.engine.protocol import Engine, EngineInfo, EngineStats, GenerateRequest, Generation
from thunder_rollout.engine.result_check import what_is_wrong
from thunder_rollout.engine.weights import UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied


class EngineHost:
    """The Engine Protocol, but that `start` may come again."""

    def __init__(self, make_engine: Callable[[], Engine], *, hang_s: float) -> None:
        self._make_engine = make_engine
        self._hang_s = hang_s
        self._engine: Engine | None = None
        self._info: EngineInfo
        self._dead: EngineDied | None = EngineDied("the engine was not started")
        self._died = asyncio.Event()
        self._starting = asyncio.Lock()
        self._gate = _TurnGate()
        self._step = (-1, 0.0)  # the newest step's number, and when it was first seen

    @property
    def engine(self) -> Engine:
        """The engine that serves; raises `EngineDied`, which blames nobody, where none does."""
        if self._dead is not None or self._engine is None:
            raise EngineDied(str(self._dead))
        return self._engine

    async def start(self) -> EngineInfo:
        async with self._starting:
            await self._end(EngineDied("the engine is being replaced"))
            self._dead = EngineDied("the engine is not started yet")
            self._engine = self._make_engine()
            self._info = await self._engine.start()
            self._died, self._gate, self._step = asyncio.Event(), _TurnGate(), (-1, 0.0)
            self._dead = None
            return self._info

    async def generate(self, request: GenerateRequest) -> Generation:
        generation: Generation = await self._unless_it_dies(self._generate(self.engine, request), request.request_id)
        return generation

    async def abort(self, request_id: str) -> None:
        await self.engine.abort(request_id)

    async def stats(self) -> EngineStats:
        engine = self.engine
        try:
            stats = await engine.stats()
        except EngineDied as error:
            self._declare_dead(error)
            raise
        self._check_progress(stats)
        return stats

    async def reset_prefix_cache(self) -> None:
        await self.engine.reset_prefix_cache()

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        return await self.engine.cache_changes(whole=whole)

    async def check_weights(self, source: WeightSource) -> None:
        await self.engine.check_weights(source)

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        try:
            await self._unless_it_dies(self.engine.update_weights(source, version=version, mode=mode), None)
        except EngineDied as error:
            self._declare_dead(error)
            raise

    async def stop(self) -> None:
        await self._end(EngineDied("the engine was stopped"))

    async def _unless_it_dies(self, work: Coroutine[Any, Any, Any], request_id: str | None) -> Any:
        """The result of what the engine does, of its turn `request_id` or another; raises `EngineDied` as
        soon as the engine is known to be dead."""
        return await unless(self._until_dead(request_id), work)

    async def _until_dead(self, request_id: str | None) -> NoReturn:
        await self._died.wait()
        assert self._dead is not None
        raise EngineDied(str(self._dead), by_turn=self._dead.by_turn and request_id in self._gate.running)

    async def _generate(self, engine: Engine, request: GenerateRequest) -> Generation:
        async with self._gate.turn(request.request_id, alone=request.suspect):
            try:
                generation = await engine.generate(request)
            except EngineDied as error:
                self._declare_dead(error)
                raise
        if wrong := what_is_wrong(request, generation, vocab_size=self._info.vocab_size):
            self._declare_dead(EngineDied(f"the engine answered nonsense: {wrong}"))
            raise EngineDied(f"the engine answered request {request.request_id} with nonsense: {wrong}", by_turn=True)
        return generation

    def _check_progress(self, stats: EngineStats) -> None:
        now_s = asyncio.get_running_loop().time()
        if stats.in_flight == 0 or stats.num_steps != self._step[0]:
            self._step = (stats.num_steps, now_s)
        elif now_s - self._step[1] > self._hang_s:
            error = EngineDied(
                f"the engine hangs: {stats.in_flight} turns, no step for {self._hang_s:g} s", by_turn=True
            )
            self._declare_dead(error)
            raise error

    def _declare_dead(self, error: EngineDied) -> None:
        if self._dead is None:
            self._dead = error
            self._died.set()

    async def _end(self, why: EngineDied) -> None:
        self._declare_dead(why)
        if self._engine is not None:
            await self._engine.stop()


class _TurnGate:
    """Turns run together; one that must run alone waits until the others have ended, and holds back
    those that come after it."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self._num_alone = 0  # running or waiting
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def turn(self, request_id: str, *, alone: bool) -> AsyncIterator[None]:
        self._num_alone += alone
        try:
            while self.running if alone else self._num_alone:
                await self._changed.wait()
            self.running.add(request_id)
            yield
        finally:
            self.running.discard(request_id)
            self._num_alone -= alone
            self._changed.set()
            self._changed = asyncio.Event()
