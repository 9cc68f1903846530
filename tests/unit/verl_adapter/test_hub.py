"""The hub over fake hosts: started once, told of images in order, figures since the last call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.remote import FleetHandles
from thunder_rollout.verl_adapter.hub import Fleet, Hub

FLEET = Fleet(run="r", handles=FleetHandles(fleet=None, hosts=()), backend="fake")


@dataclass
class Hosts:
    expected: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    lives: bool = True

    async def any_lives(self) -> bool:
        return self.lives

    async def keep_alive(self) -> None:
        await asyncio.Event().wait()

    async def num_running(self) -> int:
        return 3

    def expect(self, images: list[str]) -> None:
        self.expected = list(images)

    def sample_started(self, image: str) -> None:
        self.events.append(f"started {image}")

    def sample_finished(self, image: str) -> None:
        self.events.append(f"finished {image}")


class Opened:
    """Counts the starts; the first fail as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.images: list[list[str]] = []
        self._failures = failures

    async def __call__(self, images: list[str]) -> Fleet:
        self.images.append(images)
        await asyncio.sleep(0)
        if len(self.images) <= self._failures:
            raise SandboxFailed("no host came up")
        return FLEET


async def test_hosts_are_started_once_however_many_ask() -> None:
    opened = Opened()
    hub = Hub(opened, lambda _: Hosts())
    fleets = await asyncio.gather(*(hub.fleet([f"image{i}"]) for i in range(5)))
    assert (fleets, opened.images) == ([FLEET] * 5, [["image0"]])


async def test_hosts_that_are_all_gone_are_started_again_and_know_what_is_to_come() -> None:
    opened, made = Opened(), [Hosts(), Hosts()]
    hosts = iter(made)
    hub = Hub(opened, lambda _: next(hosts))
    await hub.fleet(["image"])
    hub.expect(["a"])
    made[0].lives = False
    assert "thunder/sandboxes" not in await hub.figures()
    await hub.fleet(["image"])
    await hub.fleet(["image"])
    assert (len(opened.images), made[1].expected) == (2, ["a"])


async def test_a_start_that_failed_is_tried_again_by_the_next() -> None:
    opened = Opened(failures=1)
    hub = Hub(opened, lambda _: Hosts())
    with pytest.raises(SandboxFailed):
        await hub.fleet([])
    assert await hub.fleet([]) == FLEET


async def test_hosts_know_what_is_to_come_of_batches_that_overlap() -> None:
    hosts = Hosts()
    hub = Hub(Opened(), lambda _: hosts)
    hub.expect(["a", "a", "b"])
    await hub.fleet([])
    assert hosts.expected == ["a", "a", "b"]
    hub.sample_started("a")
    hub.expect(["c"])
    assert hosts.expected == ["a", "b", "c"]
    hub.sample_finished("a")
    hub.sample_started("never expected")
    assert hosts.events == ["started a", "finished a", "started never expected"]


async def test_figures_count_failures_since_the_last_call() -> None:
    hub = Hub(Opened(), lambda _: Hosts())
    assert await hub.figures() == {"thunder/failures/all": 0.0, "thunder/stale": 0.0}
    await hub.fleet([])
    for kind in ("engine_died", "engine_died", "sandbox_failed", "stale"):
        hub.count_failure(kind)
    figures = await hub.figures()
    assert figures["thunder/failures/engine_died"] == 2.0
    assert (figures["thunder/failures/all"], figures["thunder/sandboxes"]) == (3.0, 3.0)
    assert figures["thunder/stale"] == 1.0
    assert (await hub.figures())["thunder/failures/all"] == 0.0
