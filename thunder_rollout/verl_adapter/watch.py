"""What verl's trainer can't do without, watched from its own process: agent loop workers, the router, the replicas.

verl starts none of them again. It waits without end for the samples of a dead worker and for a dead replica to take
new weights, so a run that lost one has to end, and to say why. Whoever waits for samples asks `Watch.check`; a
trainer that stands in one of verl's endless waits all the same is ended with its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from ray.exceptions import ActorUnavailableError

from thunder_rollout.errors import InfrastructureFailure
from thunder_rollout.remote import remote_call

logger = logging.getLogger(__name__)

WATCH_S = 1.0
MAX_LOOKS = 5  # so often in a row a trainer is found waiting for what is lost, then it is ended
LAST_WORDS_S = 2.0  # Ray takes as long to pass on what a process wrote


class RolloutDied(InfrastructureFailure):
    """A part that the trainer can't do without is gone, and the samples it had with it."""

    kind = "rollout_died"


Look = Callable[[], Awaitable[None]]


class Watch:
    """`looks` are calls, one a part, that raise `RolloutDied` once it is gone. `waits_in_vain` says whether the trainer
    stands where it could stand for ever; `end` ends it with the reason."""

    def __init__(self, looks: Iterable[Look], *, waits_in_vain: Callable[[], bool], end: Callable[[str], None]) -> None:
        self._looks = list(looks)
        self._waits_in_vain = waits_in_vain
        self._end = end
        self._lost: list[str] = []

    def check(self) -> None:
        """Raises `RolloutDied` with the reasons of all that is gone. Any thread may ask."""
        if self._lost:
            raise RolloutDied(self._why())

    async def run(self) -> None:
        """Until it is cancelled. What breaks it counts as lost, for nobody watches any more."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._end_vain_waits())
                for look in self._looks:
                    group.create_task(self._watch(look))
        except Exception as error:
            self._lost.append(f"the watch over the rollout broke: {error!r}")
            raise

    async def _watch(self, look: Look) -> None:
        while True:
            try:
                await look()
            except RolloutDied as error:
                self._lost.append(str(error))
                return
            await asyncio.sleep(WATCH_S)

    async def _end_vain_waits(self) -> None:
        num_looks = 0
        while num_looks < MAX_LOOKS:
            await asyncio.sleep(WATCH_S)
            num_looks = num_looks + 1 if self._lost and self._waits_in_vain() else 0
        self._end(self._why())

    def _why(self) -> str:
        return (
            "start the run again (with trainer.resume_mode=auto it goes on from its last checkpoint), for its rollout "
            f"lost a part: {'; '.join(self._lost)}"
        )


class TrainersWatch:
    """The watch of this process over actors, in a thread of its own."""

    def __init__(self, workers: Mapping[str, Any], router: Any, endless: Iterable[Callable[..., Any]]) -> None:
        """`workers` and `router` (a `ProgramRouter`) are handles; `endless` are verl's functions that may never
        return once one of them is gone."""
        self.router = router
        looks: list[Look] = [functools.partial(_worker_lives, name, handle) for name, handle in workers.items()]
        looks.append(functools.partial(_replicas_live, router))
        self._watch = Watch(looks, waits_in_vain=functools.partial(is_inside, tuple(endless)), end=end_process)
        self.check = self._watch.check
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._watch.run())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Before Ray is shut down in this process, where that outlives it."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)


_of_this_process: list[TrainersWatch] = []


def set_watch(watch: TrainersWatch) -> None:
    """verl gives its sampler and its manager no way to each other but the process they share."""
    _of_this_process[:] = [watch]


def find_watch() -> TrainersWatch | None:
    return _of_this_process[0] if _of_this_process else None


def is_inside(functions: Iterable[Callable[..., Any]]) -> bool:
    """Whether any thread of this process is in one of them (coroutine functions too) now."""
    codes = {inspect.unwrap(function).__code__ for function in functions}
    tops = sys._current_frames().values()
    return any(frame.f_code in codes for top in tops for frame, _ in traceback.walk_stack(top))


def end_process(why: str) -> None:
    """At once, for nothing interrupts a wait inside Ray."""
    logger.critical("%s: %s", RolloutDied.__name__, why)
    time.sleep(LAST_WORDS_S)
    os._exit(1)


async def _worker_lives(name: str, handle: Any) -> None:
    await _ask(handle.__ray_call__.remote(_nothing), name)


async def _replicas_live(router: Any) -> None:
    lost: dict[str, str] = await _ask(router.lost_servers.remote(), "the router") or {}
    if lost:
        raise RolloutDied("; ".join(f"rollout replica {name}: {why}" for name, why in lost.items()))


async def _ask(ref: Any, what: str) -> Any:
    """None from an actor that can't be reached for now: whether it is gone shows the next time."""
    try:
        return await remote_call(ref, died=RolloutDied, what=what)
    except RolloutDied as error:
        if isinstance(error.__cause__, ActorUnavailableError):
            return None
        raise


def _nothing(worker: Any) -> None: ...
