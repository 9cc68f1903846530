"""A bounded number of starts at once, the one that is due first going first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Waiting:
    due: tuple[float, int]  # when, and the order of arrival
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StartGate:
    """Nobody waits while fewer than `max_starts` are inside."""

    def __init__(self, max_starts: int) -> None:
        self._num_free = max_starts
        self._waiting: dict[Hashable, _Waiting] = {}
        self._num_arrived = 0

    @asynccontextmanager
    async def inside(self, who: Hashable, due_s: float) -> AsyncIterator[None]:
        """`due_s` is on any clock that all callers share."""
        await self._enter(who, due_s)
        try:
            yield
        finally:
            self._let_next_in()

    def hasten(self, who: Hashable, due_s: float) -> None:
        """If `who` waits, it is due at `due_s` now, where that is sooner."""
        if (waiting := self._waiting.get(who)) is not None:
            waiting.due = min(waiting.due, (due_s, waiting.due[1]))

    async def _enter(self, who: Hashable, due_s: float) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        self._num_arrived += 1
        waiting = self._waiting[who] = _Waiting((due_s, self._num_arrived))
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if not waiting.turn.cancelled():  # let in and cancelled at the same time
                self._let_next_in()
            raise
        finally:
            del self._waiting[who]

    def _let_next_in(self) -> None:
        waiting = [other for other in self._waiting.values() if not other.turn.done()]
        if waiting:
            min(waiting, key=lambda other: other.due).turn.set_result(None)
        else:
            self._num_free += 1
