"""Engines join, fail to, and are replaced, in virtual time and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.failing_engines import SUPERVISED, LocalHost, NeverStarts
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.protocol import Engine, EngineInfo
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.engine.weights import FolderWeights, MemoryWeights, UpdateMode, WeightSource
from thunder_rollout.errors import BadEvent, ConfigError, EngineDied, WeightsRefused
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.fleet import EngineFleet
from thunder_rollout.runtime.launcher import Launched
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.weights import Weights

CONFIG = replace(SUPERVISED, max_restarts=1)
NEW = MemoryWeights(shapes={}, buckets=())


class BlindEngine(FakeEngine):
    """Its node does not see the weights' folder."""

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None:
        raise WeightsRefused("weights: no such folder here")


@dataclass
class LocalLaunched:
    engine: LocalHost
    handle: Any
    info: EngineInfo
    launcher: LocalLauncher

    def free(self) -> None:
        self.launcher.held.discard(self.handle)


class LocalLauncher:
    """A cluster with room for `room` engines, each with `next_makes` first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: set[str] = set()  # names of what reserves
        self.hosts: dict[str, LocalHost] = {}
        self.next_makes: list[Callable[[], Engine]] = []

    async def launch(self, name: str, config: EngineConfig, *, place_s: float) -> Launched:
        if len(self.held) >= self.room:
            raise ConfigError("no room")
        make = self.next_makes.pop(0) if self.next_makes else lambda: FakeEngine(config)
        host = self.hosts[name] = LocalHost(make, config)
        info = await host.start()
        self.held.add(name)
        return LocalLaunched(host, name, info, self)

    async def has_room(self, config: EngineConfig) -> bool:
        return len(self.held) < self.room


@dataclass
class Shell:
    fleet: EngineFleet
    launcher: LocalLauncher
    service: SchedulerService
    weights: Weights

    def up(self) -> list[str]:
        return sorted(backend.backend for backend in self.service.metrics().scheduler.backends)


@asynccontextmanager
async def running(
    max_engines: int, *, room: int = 4, on_join: Callable[[str], None] = lambda name: None
) -> AsyncIterator[Shell]:
    service = SchedulerService(SchedulerConfig(), clock=asyncio.get_running_loop().time)
    weights, launcher = Weights(mode=UpdateMode.KEEP, batch=None), LocalLauncher(room)

    async def join(name: str, handle: Any) -> None:
        on_join(name)

    fleet = EngineFleet(
        CONFIG, LocalScheduler(service), prefix="test", on_join=join, weights=weights, launcher=launcher
    )
    await fleet.start(2)
    await fleet.announce()
    supervising = asyncio.create_task(fleet.supervise(max_engines))
    await asyncio.sleep(0)
    try:
        yield Shell(fleet, launcher, service, weights)
        assert not supervising.done(), "the run goes on"
    finally:
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
        await fleet.stop()
        await service.stop()


def test_an_engine_that_cannot_take_the_weights_frees_its_place_and_the_run_goes_on() -> None:
    async def main() -> None:
        async with running(3) as shell:
            await shell.weights.update(LocalScheduler(shell.service), NEW, version="1")
            shell.launcher.next_makes.append(lambda: BlindEngine(CONFIG))
            await asyncio.sleep(6.0)
            assert list(shell.launcher.hosts) == ["engine0", "engine1", "engine2"]
            assert shell.launcher.held == {"engine0", "engine1"}
            assert sorted(shell.fleet.handles) == shell.up() == ["engine0", "engine1"]
            await asyncio.sleep(15.0)
            assert shell.up() == ["engine0", "engine1", "engine3"], "the next one sees it"

    run_in_virtual_time(main())


@pytest.mark.parametrize("error", [EngineDied("its node is gone"), asyncio.CancelledError()])
def test_an_engine_whose_announcement_fails_leaves_nothing_behind(error: BaseException) -> None:
    def refuse(name: str) -> None:
        if name == "engine2":
            raise error

    async def main() -> None:
        async with running(2, on_join=refuse) as shell:
            with pytest.raises(type(error)):
                await shell.fleet.add()
            assert shell.launcher.held == {"engine0", "engine1"}
            assert sorted(shell.fleet.supervisors) == sorted(shell.fleet.handles) == ["engine0", "engine1"]
            with pytest.raises(EngineDied):
                await shell.launcher.hosts["engine2"].stats()
            assert await shell.fleet.add() == "engine3"

    run_in_virtual_time(main())


def test_one_that_was_heard_of_and_yet_could_not_join_is_down_again() -> None:
    class LosesAnswers(LocalScheduler):
        lost = False

        async def post(self, event: Any) -> None:
            await super().post(event)
            if self.lost:
                self.lost = False
                raise BadEvent("the answer is lost")

    async def main() -> None:
        service = SchedulerService(SchedulerConfig(), clock=asyncio.get_running_loop().time)
        scheduler, launcher = LosesAnswers(service), LocalLauncher(2)

        async def join(name: str, handle: Any) -> None:
            scheduler.lost = True

        fleet = EngineFleet(CONFIG, scheduler, prefix="test", on_join=join, launcher=launcher)
        with pytest.raises(BadEvent):
            await fleet.add()
        assert not service.metrics().scheduler.backends
        assert not launcher.held
        await service.stop()

    run_in_virtual_time(main())


@pytest.mark.parametrize("max_engines", [2, 3])
def test_an_engine_that_was_given_up_is_replaced(max_engines: int) -> None:
    async def main() -> None:
        async with running(max_engines, room=max_engines) as shell:
            await asyncio.sleep(6.0)
            host = shell.launcher.hosts["engine0"]
            host.next_makes += [lambda: NeverStarts(CONFIG)] * 3
            host.kill()
            await asyncio.sleep(15.0)
            assert "engine0" not in shell.fleet.supervisors
            assert shell.up() == [f"engine{number}" for number in range(1, max_engines + 1)]
            assert len(shell.launcher.held) == max_engines

    run_in_virtual_time(main())


def test_one_that_left_is_not_replaced_and_one_that_was_added_is() -> None:
    async def main() -> None:
        async with running(2) as shell:
            await shell.fleet.remove("engine0", drain_s=1.0)
            await asyncio.sleep(30.0)
            assert shell.up() == ["engine1"]
            assert shell.launcher.held == {"engine1"}
            await shell.fleet.add()
            host = shell.launcher.hosts["engine2"]
            host.next_makes += [lambda: NeverStarts(CONFIG)] * 3
            host.kill()
            await asyncio.sleep(15.0)
            assert shell.up() == ["engine1", "engine3"]
            await shell.fleet.remove("engine3", drain_s=1.0)
            await asyncio.sleep(30.0)
            assert shell.up() == ["engine1"]

    run_in_virtual_time(main())


def test_none_joins_in_the_place_of_one_that_left_where_more_were_to_join_once_there_is_room() -> None:
    async def main() -> None:
        async with running(4, room=2) as shell:
            await shell.fleet.remove("engine0", drain_s=1.0)
            await asyncio.sleep(30.0)
            assert shell.up() == ["engine1"]

    run_in_virtual_time(main())


def test_weights_that_the_first_engines_refuse_end_the_start() -> None:
    async def main() -> None:
        weights = Weights(mode=UpdateMode.KEEP, batch=None)
        weights.start_with(FolderWeights(path="/nowhere"), version="1")
        service = SchedulerService(SchedulerConfig(), clock=asyncio.get_running_loop().time)

        async def join(name: str, handle: Any) -> None: ...

        fleet = EngineFleet(
            CONFIG, LocalScheduler(service), prefix="test", on_join=join, weights=weights, launcher=LocalLauncher(2)
        )
        await fleet.start(1)
        with pytest.raises(WeightsRefused, match="/nowhere"):
            await fleet.announce()
        await fleet.stop()
        await service.stop()

    run_in_virtual_time(main())
