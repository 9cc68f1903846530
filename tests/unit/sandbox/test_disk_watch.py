"""`DiskWatch` over a fake engine: looks that fail, sandboxes that come and go, one that takes its time."""

from __future__ import annotations

import asyncio

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.disk_watch import DiskWatch


class FakeEngine:
    def __init__(self) -> None:
        self.written: dict[str, int] = {}
        self.failures: list[Exception] = []
        self.looks: list[list[str]] = []

    async def measure(self, containers: list[str]) -> dict[str, int]:
        self.looks.append(containers)
        if self.failures:
            raise self.failures.pop()
        return {name: num_bytes for name, num_bytes in self.written.items() if name in containers}


class Seen:
    def __init__(self) -> None:
        self.heard: list[int] = []
        self.failure: Exception | None = None
        self.busy = asyncio.Event()
        self.busy.set()

    async def __call__(self, num_bytes: int) -> None:
        self.heard.append(num_bytes)
        await self.busy.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def watch(engine: FakeEngine) -> DiskWatch:
    return DiskWatch(engine.measure, every_s=0.005)


async def test_one_look_is_at_all_and_each_hears_of_its_own(engine: FakeEngine, watch: DiskWatch) -> None:
    first, second = Seen(), Seen()
    watch.add("a", first, is_busy=lambda: True)
    watch.add("b", second, is_busy=lambda: True)
    engine.written = {"a": 1, "b": 2}
    await asyncio.sleep(0.05)
    assert engine.looks[0] == ["a", "b"]
    assert set(first.heard) == {1} and set(second.heard) == {2}
    watch.drop("a")
    watch.drop("a")
    await asyncio.sleep(0.02)
    assert engine.looks[-1] == ["b"]
    watch.drop("b")
    num_looks = len(engine.looks)
    await asyncio.sleep(0.02)
    assert len(engine.looks) == num_looks, "nobody is there to look at"
    watch.add("c", first, is_busy=lambda: True)
    await asyncio.sleep(0.02)
    assert engine.looks[-1] == ["c"]
    watch.drop("c")


@pytest.mark.parametrize("failure", [SandboxFailed("no answer"), OSError("busy"), TimeoutError()])
async def test_it_goes_on_after_a_look_or_a_sandbox_that_failed(
    engine: FakeEngine, watch: DiskWatch, failure: Exception
) -> None:
    seen = Seen()
    seen.failure = failure
    engine.failures = [failure, failure]
    engine.written = {"a": 1}
    watch.add("a", seen, is_busy=lambda: True)
    await asyncio.sleep(0.1)
    assert engine.failures == []
    assert len(seen.heard) > 1
    watch.drop("a")


async def test_who_is_at_work_is_not_told_again_and_is_let_go_with_its_container(
    engine: FakeEngine, watch: DiskWatch
) -> None:
    slow, other = Seen(), Seen()
    slow.busy.clear()
    engine.written = {"a": 1, "b": 2}
    watch.add("a", slow, is_busy=lambda: True)
    watch.add("b", other, is_busy=lambda: True)
    await asyncio.sleep(0.05)
    assert slow.heard == [1] and len(other.heard) > 1
    watch.drop("a")
    watch.drop("b")


async def test_where_no_command_is_under_way_a_look_is_rarer(engine: FakeEngine, watch: DiskWatch) -> None:
    busy: set[str] = set()
    for name in ("a", "b"):
        watch.add(name, Seen(), is_busy=lambda name=name: name in busy)
    await asyncio.sleep(0.1)
    assert engine.looks and all(look == ["a", "b"] for look in engine.looks)
    num_rare = len(engine.looks)
    engine.looks.clear()
    busy.add("b")
    await asyncio.sleep(0.1)
    assert engine.looks.count(["b"]) > num_rare / 2 and ["a", "b"] in engine.looks
    watch.drop("a")
    watch.drop("b")


async def test_a_bug_in_a_look_is_told_to_whoever_comes_next(engine: FakeEngine, watch: DiskWatch) -> None:
    engine.failures = [ZeroDivisionError("a bug")]
    watch.add("a", Seen(), is_busy=lambda: True)
    await asyncio.sleep(0.02)
    with pytest.raises(ZeroDivisionError):
        watch.add("b", Seen(), is_busy=lambda: True)
