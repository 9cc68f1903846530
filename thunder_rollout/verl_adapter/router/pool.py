"""verl's replicas as backends of the scheduler: who is there, what they can do, whose gate is shut.

Nobody tells a router of a weight update: it reads the replicas. One that verl paused (its requests were
aborted) has its gate shut, as `WeightsUpdating` says, until it is seen to serve again; gates that shut
together open together (`SETTLE_S`), so that what waits spreads over all. One whose weights have another
version than before, unpaused, was updated while it slept between two steps. Either way its cache is void.

A sleeping replica needs no watching of its own: verl asks it for nothing until it has new weights, and
the first request after a quiet time reads them before it is placed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thunder_rollout.core.events import BackendDown, BackendUp, Event, WeightsUpdated, WeightsUpdating
from thunder_rollout.errors import EngineDied
from thunder_rollout.verl_adapter.router.config import RouterConfig
from thunder_rollout.verl_adapter.router.replica import ReplicaFacts, ReplicaPort, ReplicaState

logger = logging.getLogger(__name__)

SETTLE_S = 0.5  # gates that are ready wait so long for others that are shut
SHUT_POLL_S = 0.1  # replicas are read as often while a gate is shut
LATE_S = 5.0  # a release of an aborted turn comes at most so long after its replica serves again
STATE_TIMEOUT_S = 30.0  # a replica that does not answer for so long is taken to be as it was
REFRESH_S = 1.0  # who reads all replicas waits so long for the slowest


@dataclass(slots=True)
class Replica:
    """A member of the pool; `version` is that of the weights it served when it was last seen open."""

    name: str
    port: ReplicaPort
    facts: ReplicaFacts
    generation: int
    version: int | None
    is_shut: bool
    opened_s: float = float("-inf")  # when it was last
    ready_since_s: float | None = None  # shut, and seen to serve again
    ready_version: int | None = None
    reading: asyncio.Task[ReplicaState] | None = field(default=None, repr=False)
    next_reading: asyncio.Task[ReplicaState] | None = field(default=None, repr=False)


class ReplicaPool:
    def __init__(self, config: RouterConfig, handle: Callable[[Event], None], clock: Callable[[], float]) -> None:
        """`handle` feeds the scheduler."""
        self._config = config
        self._handle = handle
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._generations: dict[str, int] = {}
        self._refreshing: dict[str, asyncio.Task[ReplicaState | None]] = {}
        self.lost: dict[str, str] = {}  # why, of those that died; until verl removes them or brings others
        self.refreshed_s = float("-inf")

    def __len__(self) -> int:
        return len(self._replicas)

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def __getitem__(self, name: str) -> Replica:
        return self._replicas[name]

    @property
    def names(self) -> list[str]:
        return list(self._replicas)

    @property
    def version(self) -> int | None:
        """Of the newest weights that are served."""
        return max((r.version for r in self._replicas.values() if r.version is not None), default=None)

    def is_validation(self, sampling_params: Mapping[str, Any]) -> bool:
        """Whether this is how verl's validation samples, and training does not."""
        told = next(iter(self._replicas.values())).facts.validation if self._replicas else None
        return told is not None and told.matches(sampling_params)

    @property
    def poll_s(self) -> float:
        return SHUT_POLL_S if any(r.is_shut for r in self._replicas.values()) else self._config.poll_s

    async def join(self, name: str, port: ReplicaPort) -> ReplicaFacts | None:
        """What it told; None for a member, and for a dead one, which is lost. Raises `ConfigError` for a replica that
        can't be scheduled, `TimeoutError` for one that does not answer."""
        if name in self._replicas:
            return None
        try:
            facts, state = await _meet(name, port)
        except EngineDied as error:
            logger.warning("replica=%s does not join: %s", name, error)
            self.lost[name] = str(error)
            return None
        self._add(name, port, facts, state)
        return facts

    def leave(self, names: list[str], why: str) -> None:
        for name in names:
            self.lost.pop(name, None)
            replica = self._replicas.pop(name, None)
            if replica is not None:
                logger.info("replica=%s left: %s", name, why)
                self._handle(BackendDown(backend=name, generation=replica.generation, reason=why))

    async def refresh(self) -> dict[str, ReplicaState]:
        """Read all as they are now; what is not told, or not in time, is left out: no replica waits for another."""
        slow = {name: task for name, task in self._refreshing.items() if not task.done()}
        self._refreshing = {
            name: slow.get(name) or asyncio.create_task(self.fresh_state(name), name=f"refresh {name}")
            for name in self.names
        }
        if self._refreshing:
            await asyncio.wait(self._refreshing.values(), timeout=REFRESH_S)
        self._open_ready()
        self.refreshed_s = self._clock()
        states = {name: task.result() for name, task in self._refreshing.items() if task.done()}
        return {name: state for name, state in states.items() if state is not None}

    async def fresh_state(self, name: str) -> ReplicaState | None:
        """As it is now or later; None for one that left or does not answer. Callers share readings."""
        replica = self._replicas.get(name)
        if replica is None:
            return None
        if replica.next_reading is None:
            replica.next_reading = asyncio.create_task(self._read(replica), name=f"state of {name}")
        try:
            state = await asyncio.shield(replica.next_reading)
        except TimeoutError:
            logger.warning("replica=%s did not tell its state within %.0f s", name, STATE_TIMEOUT_S)
            return None
        except EngineDied as error:
            self._lose(replica, str(error))
            return None
        self._apply(replica, state)
        return state

    def was_cut(self, name: str, granted_under: int | None, state: ReplicaState | None) -> bool:
        """Whether a turn that was released now, granted under that version of the weights, was aborted: its replica
        is gone or paused, or was until just now. One that comes later was parked there meanwhile, and ran."""
        replica = self._replicas.get(name)
        if replica is None or (state is not None and state.paused):
            return True
        return state is not None and state.version != granted_under and self._clock() - replica.opened_s < LATE_S

    def void_caches(self) -> None:
        """Everybody may move: as after an update, though no weights changed."""
        names = tuple(name for name, replica in self._replicas.items() if not replica.is_shut)
        self._handle(WeightsUpdating(backends=names))
        self._handle(WeightsUpdated(backends=names))

    async def stop(self) -> None:
        readings: list[asyncio.Task[Any]] = list(self._refreshing.values())
        readings += [task for r in self._replicas.values() for task in (r.reading, r.next_reading) if task is not None]
        for task in readings:
            task.cancel()
        await asyncio.gather(*readings, return_exceptions=True)

    # Inside

    def _add(self, name: str, port: ReplicaPort, facts: ReplicaFacts, state: ReplicaState) -> None:
        for warning in facts.warnings:
            logger.warning("replica=%s: %s", name, warning)
        self.lost.pop(name, None)
        generation = self._generations[name] = self._generations.get(name, -1) + 1
        self._replicas[name] = Replica(
            name=name, port=port, facts=facts, generation=generation, version=state.version, is_shut=state.paused
        )
        self._handle(
            BackendUp(
                backend=name,
                generation=generation,
                capacity_tokens=facts.capacity_tokens,
                max_running=facts.max_running,
                block_size=facts.block_size,
                updating=state.paused,
            )
        )

    async def _read(self, replica: Replica) -> ReplicaState:
        """One at a time: one that is asked for while another is under way starts after it."""
        if replica.reading is not None:
            await asyncio.wait([replica.reading])
        replica.reading, replica.next_reading = replica.next_reading, None
        async with asyncio.timeout(STATE_TIMEOUT_S):
            return await replica.port.state()

    def _lose(self, replica: Replica, why: str) -> None:
        if self._replicas.get(replica.name) is replica:
            self.leave([replica.name], why)
            self.lost[replica.name] = why

    def _apply(self, replica: Replica, state: ReplicaState) -> None:
        if self._replicas.get(replica.name) is not replica:
            return
        if state.broken is not None:
            self._lose(replica, state.broken)
        elif state.paused:
            replica.ready_since_s = None
            if not replica.is_shut:
                replica.is_shut = True
                self._handle(WeightsUpdating(backends=(replica.name,)))
        elif replica.is_shut:
            replica.ready_version = state.version
            if replica.ready_since_s is None:
                replica.ready_since_s = self._clock()
        elif state.version != replica.version:
            self._handle(WeightsUpdating(backends=(replica.name,)))
            self._open([replica], state.version)

    def _open_ready(self) -> None:
        shut = [replica for replica in self._replicas.values() if replica.is_shut]
        ready = {replica.name: replica.ready_since_s for replica in shut if replica.ready_since_s is not None}
        if not ready or (len(ready) < len(shut) and self._clock() - min(ready.values()) < SETTLE_S):
            return
        for version in {self._replicas[name].ready_version: None for name in ready}:
            self._open([r for r in shut if r.name in ready and r.ready_version == version], version)

    def _open(self, replicas: list[Replica], version: int | None) -> None:
        """No version is told where none of them has another than before."""
        is_new = any(replica.version != version for replica in replicas)
        for replica in replicas:
            replica.version, replica.is_shut, replica.ready_since_s = version, False, None
            replica.opened_s = self._clock()
        told = str(version) if is_new and version is not None else None
        self._handle(WeightsUpdated(backends=tuple(replica.name for replica in replicas), version=told))


async def _meet(name: str, port: ReplicaPort) -> tuple[ReplicaFacts, ReplicaState]:
    try:
        async with asyncio.timeout(STATE_TIMEOUT_S):
            facts, state = await port.facts(), await port.state()
    except TimeoutError:
        raise TimeoutError(f"replica {name} did not tell what it is within {STATE_TIMEOUT_S:.0f} s") from None
    if state.broken is not None:
        raise EngineDied(state.broken)
    return facts, state
