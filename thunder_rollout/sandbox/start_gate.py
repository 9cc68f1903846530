"""A bounded number of starts, or of sandboxes, at once; the one that is due first goes in first."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Waiting:
    due: tuple[float, int]  # when, and the order of arrival
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StartGate:
    """Nobody waits while fewer than `max_inside` are inside; None: nobody waits."""

    def __init__(self, max_inside: int | None) -> None:
        self._num_free = sys.maxsize if max_inside is None else max_inside
        self._waiting: dict[Hashable, _Waiting] = {}
        self._num_arrived = 0

    @asynccontextmanager
    async def inside(self, who: Hashable, due_s: float) -> AsyncIterator[None]:
        """See `enter`."""
        await self.enter(who, due_s)
        try:
            yield
        finally:
            self.leave()

    @property
    def num_free(self) -> int:
        return self._num_free

    def hasten(self, who: Hashable, due_s: float) -> None:
        """If `who` waits, it is due at `due_s` now, where that is sooner."""
        if (waiting := self._waiting.get(who)) is not None:
            waiting.due = min(waiting.due, (due_s, waiting.due[1]))

    async def enter(self, who: Hashable, due_s: float) -> None:
        """`due_s` is on any clock that all callers share. Whoever is in has to `leave`; cancelled, it isn't."""
        if self._num_free:
            self._num_free -= 1
            return
        self._num_arrived += 1
        waiting = self._waiting[who] = _Waiting((due_s, self._num_arrived))
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if not waiting.turn.cancelled():  # let in and cancelled at the same time
                self.leave()
            raise
        finally:
            del self._waiting[who]

    def leave(self) -> None:
        """Whoever is due first goes in."""
        waiting = [other for other in self._waiting.values() if not other.turn.done()]
        if waiting:
            min(waiting, key=lambda other: other.due).turn.set_result(None)
        else:
            self._num_free += 1
