"""`SandboxFleet` over fake hosts: lost hosts, silent ones, and who is told what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.fleet import SandboxFleet
from thunder_rollout.sandbox.placement import HostStats

STATS = HostStats(num_starting=0, num_running=3, num_started=3, num_failed=0, mean_start_s=1.0)


class FakeHost:
    def __init__(self) -> None:
        self.is_gone = False
        self.is_silent = False
        self.broken: Exception | None = None
        self.expected: list[str] = []
        self.under_way: list[str] = []
        self.starts: list[list[str]] = []
        self.num_kills = 0

    async def start(self, images: list[str]) -> str:
        self.starts.append(images)
        if self.is_gone or self.is_silent:
            raise SandboxFailed("no node for it")
        return "fake"

    def kill(self) -> None:
        self.num_kills += 1

    async def stats(self) -> HostStats:
        if self.is_silent:
            await asyncio.sleep(1000)
        if self.is_gone:
            raise SandboxFailed("the sandbox host actor is gone")
        if self.broken:
            raise self.broken
        return STATS

    def expect(self, images: list[str]) -> None:
        self.expected = images

    def sample_started(self, image: str) -> None:
        self.under_way.append(image)

    def sample_finished(self, image: str) -> None:
        self.under_way.remove(image)


async def fleet_of(*hosts: FakeHost) -> SandboxFleet:
    fleet = SandboxFleet(hosts, report_s=0.005, silence_s=0.05)
    await fleet.start()
    return fleet


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("not within 5 s")


@pytest.mark.parametrize("how", ["is_gone", "is_silent"])
async def test_a_host_that_is_gone_or_silent_is_lost_and_its_images_get_another_home(how: str) -> None:
    hosts = FakeHost(), FakeHost()
    fleet = await fleet_of(*hosts)
    images = [f"i{i}:latest" for i in range(20)]
    fleet.expect(images)
    assert sorted(hosts[0].expected + hosts[1].expected) == sorted(images)
    assert hosts[0].expected and hosts[1].expected
    assert fleet.num_running() == 6
    setattr(hosts[1], how, True)
    await until(lambda: fleet.num_running() == 3)
    assert hosts[0].expected == images
    assert {fleet.place(f"p{i}", f"i{i}", 1) for i in range(6)} == {0}
    await fleet.stop()


async def test_who_could_not_reach_a_host_is_heard_but_not_believed() -> None:
    hosts = FakeHost(), FakeHost()
    fleet = SandboxFleet(hosts, report_s=1000)
    await fleet.start()
    await fleet.suspect(0)
    assert fleet.num_running() == 6
    hosts[0].is_gone = True
    await fleet.suspect(0)
    await fleet.suspect(0)
    assert fleet.num_running() == 3
    assert fleet.place("p", "i", 1) == 1
    await fleet.stop()


async def test_a_host_gone_before_the_start_is_lost_and_without_any_left_it_says_so() -> None:
    host = FakeHost()
    host.is_gone = True
    fleet = await fleet_of(host)
    with pytest.raises(SandboxFailed, match="no sandbox host is left"):
        fleet.place("p", "i", 1)
    fleet.expect(["i"])
    fleet.sample_started("i")
    fleet.sample_finished("i")
    await fleet.stop()


async def test_the_home_of_an_image_hears_of_its_samples_under_the_engines_name() -> None:
    hosts = FakeHost(), FakeHost()
    fleet = await fleet_of(*hosts)
    fleet.expect(["docker.io/i", "i"])
    fleet.sample_started("docker.io/i")
    [home] = [host for host in hosts if host.expected]
    assert home.expected == ["i:latest", "i:latest"]
    assert home.under_way == ["i:latest"]
    fleet.sample_finished("i")
    assert home.under_way == []
    await fleet.stop()
    await fleet.stop()


async def test_a_bug_in_a_report_is_told_to_whoever_asks_next() -> None:
    host = FakeHost()
    fleet = await fleet_of(host)
    host.broken = ZeroDivisionError("a bug")
    await asyncio.sleep(0.05)
    with pytest.raises(ZeroDivisionError):
        fleet.place("p", "i", 1)
    await fleet.stop()


@pytest.mark.parametrize("how", ["is_gone", "is_silent"])
async def test_a_lost_host_is_started_again_and_takes_new_programs(how: str) -> None:
    hosts = FakeHost(), FakeHost()
    fleet = SandboxFleet(hosts, report_s=0.005, silence_s=0.05)
    await fleet.start(["toy"])
    placed = {f"p{i}": fleet.place(f"p{i}", "i", 1) for i in range(4)}
    setattr(hosts[1], how, True)
    await until(lambda: fleet.num_running() == 3)
    assert hosts[1].num_kills == (how == "is_silent"), "a process that hangs is ended first"
    assert {fleet.locate(program) for program in placed} == {0, None}
    await until(lambda: len(hosts[1].starts) > 1)
    setattr(hosts[1], how, False)
    await until(lambda: fleet.num_running() == 6)
    assert hosts[1].starts[-1] == ["toy"]
    assert {fleet.place(f"q{i}", f"i{i}", 1) for i in range(20)} == {0, 1}
    await fleet.stop()


async def test_a_host_that_does_not_start_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.fleet.MAX_RESTARTS", 2)
    host = FakeHost()
    fleet = await fleet_of(host)
    host.is_gone = True
    await until(lambda: len(host.starts) == 2)
    await until(lambda: all(task.done() for task in fleet._listening))
    with pytest.raises(SandboxFailed, match="no sandbox host is left"):
        fleet.place("p", "i", 1)
    await fleet.stop()


async def test_a_start_that_hangs_is_ended_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.fleet.START_TIMEOUT_S", 0.02)
    host = FakeHost()
    fleet = await fleet_of(host)
    host.is_gone = True
    await until(lambda: fleet.num_running() == 0)
    host.is_gone = False
    hang = asyncio.Event()
    first_start = host.start

    async def hanging(images: list[str]) -> str:
        host.start = first_start  # type: ignore[method-assign]
        await hang.wait()
        return "fake"

    host.start = hanging  # type: ignore[method-assign]
    await until(lambda: fleet.num_running() == 3)
    await fleet.stop()
