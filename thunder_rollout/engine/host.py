"""One engine after another in one process; the newest serves.

Contract: `start` makes and starts a new engine and ends the one before, also one that hangs. From
the moment an engine is known to be dead, every call of its turns raises `EngineDied` with the
reason, and so does every later call until the next `start`. It is dead when
- it says so,
- it holds turns and made no step for `hang_s` (seen by `stats`, so ask it often), or
- it gave a result that can't be (`engine.result_check`).

`EngineDied.by_turn` says whether the turn may be the cause: it ran when the engine failed at its
work, or the impossible result was its own; `num_together` with how many others. Turns under such suspicion
run in small company (`GenerateRequest.max_together`), so that the next death leaves fewer to suspect.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

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
        self._engine: Engine | None = None  # the newest, started or not
        self._life: _Life | None = None  # of the newest, once it is started
        self._why_none = "the engine was not started"
        self._starting = asyncio.Lock()

    async def start(self) -> EngineInfo:
        async with self._starting:
            await self._end("the engine is being replaced")
            self._why_none = "the engine is not started yet"
            self._engine = self._make_engine()
            info = await self._engine.start()
            self._life = _Life(self._engine, vocab_size=info.vocab_size, hang_s=self._hang_s)
            return info

    async def generate(self, request: GenerateRequest) -> Generation:
        return await self._alive().generate(request)

    async def abort(self, request_id: str) -> None:
        await self._alive().engine.abort(request_id)

    async def stats(self) -> EngineStats:
        return await self._alive().stats()

    async def reset_prefix_cache(self) -> None:
        await self._alive().engine.reset_prefix_cache()

    async def cache_changes(self, *, whole: bool = False) -> CacheChanges | None:
        return await self._alive().engine.cache_changes(whole=whole)

    async def check_weights(self, source: WeightSource) -> None:
        await self._alive().engine.check_weights(source)

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        await self._alive().update_weights(source, version=version, mode=mode)

    async def stop(self) -> None:
        await self._end("the engine was stopped")

    def _alive(self) -> _Life:
        """Raises `EngineDied`, which blames nobody, where no engine serves."""
        if self._life is None:
            raise EngineDied(self._why_none, num_together=0)
        if self._life.death is not None:
            raise EngineDied(str(self._life.death), num_together=0)
        return self._life

    async def _end(self, why: str) -> None:
        if self._life is not None:
            self._life.end(EngineDied(why))
        self._life, self._why_none = None, why
        if self._engine is not None:
            await self._engine.stop()


class _Life:
    """Of one started engine, with the turns it was given; what is late to hear of its death means no other."""

    def __init__(self, engine: Engine, *, vocab_size: int, hang_s: float) -> None:
        self.engine = engine
        self.death: EngineDied | None = None
        self._vocab_size = vocab_size
        self._hang_s = hang_s
        self._died = asyncio.Event()
        self._gate = _TurnGate()
        self._ran: list[str] = []  # the turns that ran as it died
        self._step = (-1, 0.0)  # the newest step's number, and when it was first seen

    async def generate(self, request: GenerateRequest) -> Generation:
        return await unless(self._until_dead(request.request_id), self._run_turn(request))

    async def stats(self) -> EngineStats:
        try:
            stats = await self.engine.stats()
        except EngineDied as error:
            self.end(error)
            raise
        self._check_progress(stats)
        return stats

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        try:
            update = self.engine.update_weights(source, version=version, mode=mode)
            await unless(self._until_dead(None), update)
        except EngineDied as error:
            self.end(error)
            raise

    def end(self, death: EngineDied) -> None:
        """From here on it is dead, for the first reason that is given."""
        if self.death is None:
            self.death = death
            self._ran = [place.request_id for place in self._gate.running]
            self._died.set()

    async def _run_turn(self, request: GenerateRequest) -> Generation:
        async with self._gate.turn(request):
            try:
                generation = await self.engine.generate(request)
            except EngineDied as error:
                self.end(error)
                raise self._as_heard_by(request.request_id) from error
        if wrong := what_is_wrong(request, generation, vocab_size=self._vocab_size):
            self.end(EngineDied(f"the engine answered nonsense: {wrong}"))
            message = f"the engine answered request {request.request_id} with nonsense: {wrong}"
            raise EngineDied(message, by_turn=True, num_together=1)
        return generation

    async def _until_dead(self, request_id: str | None) -> NoReturn:
        await self._died.wait()
        raise self._as_heard_by(request_id)

    def _as_heard_by(self, request_id: str | None) -> EngineDied:
        assert self.death is not None
        ran = request_id in self._ran
        return EngineDied(
            str(self.death), by_turn=ran and self.death.by_turn, num_together=len(self._ran) if ran else 0
        )

    def _check_progress(self, stats: EngineStats) -> None:
        now_s = asyncio.get_running_loop().time()
        if stats.in_flight == 0 or stats.num_steps != self._step[0]:
            self._step = (stats.num_steps, now_s)
        elif now_s - self._step[1] > self._hang_s:
            why = f"the engine hangs: {stats.in_flight} turns, no step for {self._hang_s:g} s"
            self.end(EngineDied(why, by_turn=True))
            raise EngineDied(why)


@dataclass(slots=True, eq=False)
class _Place:
    request_id: str
    max_together: float
    taken: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _TurnGate:
    """Turns run together, but never more at a time than each of them allows. Those that allow the fewest go
    first, and meanwhile hold back those that come after them."""

    def __init__(self) -> None:
        self.running: set[_Place] = set()
        self._waiting: list[tuple[float, int, _Place]] = []  # a heap
        self._numbers = itertools.count()

    @asynccontextmanager
    async def turn(self, request: GenerateRequest) -> AsyncIterator[None]:
        place = _Place(request.request_id, request.max_together or math.inf)
        heapq.heappush(self._waiting, (place.max_together, next(self._numbers), place))
        self._admit()
        try:
            await place.taken
            yield
        finally:
            self.running.discard(place)
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            place = self._waiting[0][-1]
            if not place.taken.cancelled():
                allowed = min(turn.max_together for turn in (place, *self.running))
                if len(self.running) >= allowed:
                    return
                self.running.add(place)
                place.taken.set_result(None)
            heapq.heappop(self._waiting)
