"""Engines on Ray that are killed, join and leave, under a scheduler that writes down what it hears."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import pytest_asyncio
import ray

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.core.events import BackendDown, BackendStats, BackendUp, Event
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError, EngineDied
from thunder_rollout.runtime.fleet import EngineFleet

FAKE = replace(CONFIG, kind="fake", report_s=0.2, hang_s=2.0)

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.asyncio(loop_scope="module")]


class RecordingScheduler:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def post(self, event: Event) -> None:
        self.events.append(event)

    async def report(self, stats: BackendStats) -> bool:
        return True

    async def heard(self, kind: type[Event], backend: str, generation: int) -> None:
        def told() -> bool:
            news = [event for event in self.events if isinstance(event, kind)]
            return (backend, generation) in [(event.backend, event.generation) for event in news]  # type: ignore[union-attr]

        await eventually(told)


async def eventually(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        await asyncio.sleep(0.05)
    pytest.fail("not within 30 s")


class Watched:
    def __init__(self) -> None:
        self.scheduler = RecordingScheduler()
        self.joined: list[str] = []
        self.fleet = EngineFleet(FAKE, self.scheduler, prefix="test", on_join=self._on_join)

    async def _on_join(self, name: str, handle: Any) -> None:
        assert not any(getattr(event, "backend", "") == name for event in self.scheduler.events)
        self.joined.append(name)

    def engine(self, name: str) -> RemoteEngine:
        return RemoteEngine(self.fleet.handles[name])

    async def pid(self, name: str) -> int:
        return await self.fleet.handles[name].pid.remote()


@pytest_asyncio.fixture(loop_scope="module")
async def watched() -> AsyncIterator[Watched]:
    watched = Watched()
    await watched.fleet.start(2)
    await watched.fleet.announce()
    supervising = asyncio.create_task(watched.fleet.supervise(2))
    await asyncio.sleep(0)
    yield watched
    supervising.cancel()
    await asyncio.gather(supervising, return_exceptions=True)
    await watched.fleet.stop()
    watched.fleet.shutdown()


async def test_a_killed_actor_serves_again_behind_the_same_handle(watched: Watched) -> None:
    engine = watched.engine("engine0")
    pid = await watched.pid("engine0")
    turn = asyncio.create_task(run(engine, new_prompt(50), max_tokens=1900))
    await asyncio.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDied) as caught:
        await turn
    assert not caught.value.by_turn, "killed from outside"
    await watched.scheduler.heard(BackendUp, "engine0", 1)
    assert len((await run(engine, new_prompt(50))).token_ids) == 20


async def test_a_stopped_actor_is_killed_and_serves_again(watched: Watched) -> None:
    engine = watched.engine("engine1")
    pid = await watched.pid("engine1")
    os.kill(pid, signal.SIGSTOP)
    await watched.scheduler.heard(BackendDown, "engine1", 0)
    await watched.scheduler.heard(BackendUp, "engine1", 1)
    assert len((await run(engine, new_prompt(50))).token_ids) == 20
    assert not psutil.pid_exists(pid)


async def test_an_engine_joins_and_leaves_while_turns_run(watched: Watched) -> None:
    free = ray.available_resources()["CPU"]
    name = await watched.fleet.add()
    assert watched.joined == [name] == ["engine2"]
    assert isinstance(watched.scheduler.events[-1], BackendUp)
    turn = asyncio.create_task(run(watched.engine(name), new_prompt(50), max_tokens=500))
    await asyncio.sleep(0.2)
    await watched.fleet.remove(name, drain_s=30)
    assert watched.scheduler.events[-1] == BackendDown(backend=name, generation=0, reason="it leaves the run")
    assert len((await turn).token_ids) == 500, "a turn in flight finishes"
    with pytest.raises(EngineDied):
        await watched.engine(name).stats()
    await eventually(lambda: ray.available_resources()["CPU"] >= free)
    with pytest.raises(ConfigError, match="no engine 'engine2' is up; there are: engine0, engine1"):
        await watched.fleet.remove(name, drain_s=0)


async def test_turns_that_do_not_finish_in_time_are_told_to_move(watched: Watched) -> None:
    name = await watched.fleet.add()
    turn = asyncio.create_task(run(watched.engine(name), new_prompt(50), max_tokens=1900))
    await asyncio.sleep(0.2)
    await watched.fleet.remove(name, drain_s=0.1)
    with pytest.raises(EngineDied) as caught:
        await turn
    assert not caught.value.by_turn
