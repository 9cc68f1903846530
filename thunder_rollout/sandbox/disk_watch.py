"""What sandboxes write where no quota binds them, seen for as long as they are up, commands or none.

One look is at many at once: an engine walks every file that a container wrote to tell its size (the sum of the
files' own, so that many tiny files take more of the disk than they count for). A sandbox with a command under way is
in each look, the others, where only what was left behind can write, in every fourth. Between looks lie `EVERY_S`, or
four times as long as the last one took, so that looking never takes more than a fifth of the time. A look that the
engine refuses is one look less.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from thunder_rollout.errors import SandboxFailed

logger = logging.getLogger(__name__)

EVERY_S = 1.0
_PAUSE_PER_LOOK = 4.0
_LOOKS_PER_IDLE = 4

Measure = Callable[[list[str]], Awaitable[dict[str, int]]]
See = Callable[[int], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Watched:
    see: See
    is_busy: Callable[[], bool]
    seeing: asyncio.Task[None] | None = None


class DiskWatch:
    """`measure` tells the bytes that each of the containers it is asked for has written; it may leave some out."""

    def __init__(self, measure: Measure, *, every_s: float = EVERY_S) -> None:
        self._measure = measure
        self._every_s = every_s
        self._watched: dict[str, _Watched] = {}
        self._looking: asyncio.Task[None] | None = None

    def add(self, container: str, see: See, *, is_busy: Callable[[], bool]) -> None:
        """From now until `drop`, `see` hears at each look how much the container has written, unless it is at work
        on the last one still. It may raise what a sandbox's calls do. `is_busy`: whether a command is under way."""
        if self._looking is not None and self._looking.done() and not self._looking.cancelled():
            self._looking.result()  # it ends by itself only by a bug of ours
        self._watched[container] = _Watched(see, is_busy)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_on(), name="watch-disk")

    def drop(self, container: str) -> None:
        """Idempotent."""
        watched = self._watched.pop(container, None)
        if watched is not None and watched.seeing is not None:
            watched.seeing.cancel()
        if not self._watched and self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def _look_on(self) -> None:
        pause_s = self._every_s
        for number in itertools.count(1):
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            of_all = number % _LOOKS_PER_IDLE == 0
            due = [container for container, watched in self._watched.items() if of_all or watched.is_busy()]
            try:
                written = await self._measure(due) if due else {}
            except (SandboxFailed, OSError) as error:
                logger.warning("it can't be told now what sandboxes have written: %s", error)
                written = {}
            pause_s = max(self._every_s, _PAUSE_PER_LOOK * (time.monotonic() - began_s))
            for container, num_bytes in written.items():
                watched = self._watched.get(container)
                if watched is not None and (watched.seeing is None or watched.seeing.done()):
                    watched.seeing = asyncio.create_task(_seen(watched.see, num_bytes), name="see-disk")


async def _seen(see: See, num_bytes: int) -> None:
    try:
        await see(num_bytes)
    except (SandboxFailed, OSError) as error:  # its program finds out; the next look is another try
        logger.info("a sandbox over its disk_bytes can't be helped now: %s", error)
