"""`ImageStore` over a fake engine: the budget on its disk, leases, retries, pulls ahead, cancellation."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.config import ImagesConfig
from thunder_rollout.sandbox.fake_images import FakeImageEngine
from thunder_rollout.sandbox.image_cache import Image, Layer, disk_bytes
from thunder_rollout.sandbox.image_engine import PullFailed
from thunder_rollout.sandbox.image_store import ImageStore


def image(name: str, size: int = 10, base: str = "") -> Image:
    layers = [Layer(key=base, pull_bytes=12, disk_bytes=12)] if base else []
    own = Layer(key=name, pull_bytes=size, disk_bytes=size)
    return Image(name=f"{name}:latest", layers=(*layers, own))


@asynccontextmanager
async def store_of(engine: FakeImageEngine, **config: object) -> AsyncIterator[ImageStore]:
    store = ImageStore(engine, ImagesConfig(**{"retry_s": 0.001, "prefetch": 0, **config}))
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2500):
        if condition():
            return
        await asyncio.sleep(0.002)
    pytest.fail("not within 5 s")


async def test_an_image_is_pulled_once_for_all_who_need_it() -> None:
    engine = FakeImageEngine([image("a")], pull_s=0.02)
    async with store_of(engine) as store:
        await asyncio.gather(*(store.acquire("a") for _ in range(5)))
        await store.acquire("docker.io/a:latest")
        assert engine.pulls == ["a:latest"]
        assert store.stats().num_pulls == 1


async def test_what_is_there_is_not_pulled_and_what_was_removed_meanwhile_is() -> None:
    engine = FakeImageEngine([image("a")])
    engine.disk["a:latest"] = image("a")
    async with store_of(engine) as store:
        async with store.lease("a"):
            assert engine.pulls == []
        engine.disk.clear()
        async with store.lease("a"):
            assert engine.pulls == ["a:latest"]


async def test_an_image_built_during_the_run_is_found_and_stays() -> None:
    engine = FakeImageEngine([image("a")])
    async with store_of(engine, budget_bytes=30) as store:
        engine.disk["made:latest"] = image("made", 15)
        engine.local.add("made:latest")
        async with store.lease("made"):
            pass
        with pytest.raises(SandboxFailed, match=r"sandbox\.images\.budget_bytes=30: image a:latest needs 5 bytes"):
            await store.acquire("a")


async def test_no_more_pulls_at_once_than_allowed() -> None:
    engine = FakeImageEngine([image(f"i{i}") for i in range(6)], pull_s=0.02)
    async with store_of(engine, max_pulls=2) as store:
        await asyncio.gather(*(store.acquire(f"i{i}") for i in range(6)))
    assert engine.max_pulling == 2


async def test_who_needs_room_waits_until_an_image_is_free() -> None:
    engine = FakeImageEngine([image("a"), image("b"), image("c")])
    async with store_of(engine, budget_bytes=30) as store:
        await store.acquire("a")
        await store.acquire("b")
        waiting = asyncio.create_task(store.acquire("c"))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        store.release("b")
        await waiting
        assert set(engine.disk) == {"a:latest", "c:latest"}
    assert engine.peak_bytes <= 30


def kept(content_bytes: int) -> int:
    return disk_bytes(content_bytes)


async def test_a_sandbox_is_put_away_where_that_costs_no_image_that_is_in_use_or_to_come() -> None:
    engine = FakeImageEngine([image("a"), image("b"), image("c")])
    async with store_of(engine, budget_bytes=kept(5) + 20) as store:
        store.expect(["b"])
        for name in "abc":
            async with store.lease(name):
                pass
        await store.acquire("c")
        assert await store.keep(5) == kept(5)
        assert set(engine.disk) == {"b:latest", "c:latest"}
        assert store.stats().held_bytes == kept(5) + 20
        assert await store.keep(5) is None
        store.give_back(kept(5))
        assert await store.keep(5) == kept(5)
        assert set(engine.disk) == {"b:latest", "c:latest"}


async def test_who_is_put_away_waits_for_nobody_and_goes_before_nobody_who_waits_for_room() -> None:
    unit = kept(0)
    engine = FakeImageEngine([image("in use", 4 * unit), image("new", 3 * unit)])
    async with store_of(engine, budget_bytes=9 * unit) as store:
        await store.acquire("in use")
        waiting = asyncio.create_task(store.acquire("new"))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        assert await asyncio.wait_for(store.keep(0), 1) is None
        store.release("in use")
        await waiting
        assert await store.keep(0) == unit


async def test_transient_failures_are_tried_again() -> None:
    engine = FakeImageEngine([image("a")], failures=[PullFailed("connection reset", transient=True)] * 2)
    async with store_of(engine, pull_attempts=3) as store:
        await store.acquire("a")
    assert len(engine.pulls) == 3


async def test_the_last_failure_reaches_everybody_and_the_next_try_is_new() -> None:
    engine = FakeImageEngine([image("a")], failures=[PullFailed("reset", transient=True)] * 2, pull_s=0.01)
    async with store_of(engine, pull_attempts=2) as store:
        for outcome in await asyncio.gather(*(store.acquire("a") for _ in range(3)), return_exceptions=True):
            assert isinstance(outcome, PullFailed)
        await store.acquire("a")


async def test_a_name_nobody_has_is_not_tried_again() -> None:
    engine = FakeImageEngine([])
    async with store_of(engine, pull_attempts=5) as store:
        with pytest.raises(PullFailed, match="no registry has"):
            await store.acquire("missing")
    assert len(engine.pulls) == 1


async def test_the_next_samples_images_are_pulled_ahead_but_never_at_a_sooner_ones_expense() -> None:
    engine = FakeImageEngine([image(f"i{i}") for i in range(5)])
    async with store_of(engine, budget_bytes=40, prefetch=2) as store:
        store.expect([f"i{i}" for i in range(5)])
        await until(lambda: set(engine.disk) == {"i0:latest", "i1:latest"})
        store.started("i0")
        async with store.lease("i0"):
            await until(lambda: len(engine.disk) == 3)
            store.started("i1")
            await asyncio.sleep(0.03)
            assert set(engine.disk) == {"i0:latest", "i1:latest", "i2:latest"}
        store.finished("i0")
        await until(lambda: "i3:latest" in engine.disk)
        assert "i0:latest" not in engine.disk
    assert engine.peak_bytes <= 40


async def test_a_pull_ahead_that_fails_is_left_to_the_sample() -> None:
    engine = FakeImageEngine([image("a")], failures=[PullFailed("denied", transient=False)])
    async with store_of(engine, prefetch=1) as store:
        store.expect(["a"])
        await until(lambda: len(engine.pulls) == 1)
        await asyncio.sleep(0.02)
        assert len(engine.pulls) == 1
        await store.acquire("a")


async def test_a_bug_in_pulling_ahead_is_told_to_whoever_needs_an_image_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async with store_of(FakeImageEngine([image("a")]), prefetch=1) as store:
        monkeypatch.setattr(store._cache, "upcoming", lambda num_uses: 1 / 0)
        store.expect(["a"])
        await asyncio.sleep(0.01)
        with pytest.raises(ZeroDivisionError):
            await store.acquire("a")


async def test_cancelling_a_lease_leaves_the_pull_and_no_pin() -> None:
    engine = FakeImageEngine([image("a"), image("b", 20)], pull_s=0.05)
    async with store_of(engine, budget_bytes=40) as store:
        waiting = asyncio.create_task(store.acquire("a"))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: "a:latest" in engine.disk)
        await store.acquire("b")
        assert engine.pulls == ["a:latest", "b:latest"]
        assert set(engine.disk) == {"b:latest"}


async def test_an_image_somebody_elses_container_uses_is_passed_over() -> None:
    engine = FakeImageEngine([image("new")])
    engine.disk |= {"a:latest": image("a"), "b:latest": image("b")}
    engine.held.add("a:latest")
    async with store_of(engine, budget_bytes=35) as store:
        await store.acquire("new")
    assert set(engine.disk) == {"a:latest", "new:latest"}


async def test_stop_ends_a_pull_and_whoever_waits_for_it() -> None:
    engine = FakeImageEngine([image("a")], pull_s=0.2)
    store = ImageStore(engine, ImagesConfig())
    await store.start()
    waiting = asyncio.create_task(store.acquire("a"))
    await asyncio.sleep(0.02)
    began_s = time.monotonic()
    await store.stop()
    await store.stop()
    with pytest.raises(SandboxFailed, match="stopped"):
        await waiting
    assert time.monotonic() - began_s < 0.15


@pytest.mark.parametrize("seed", range(5))
async def test_many_samples_at_once_never_pass_the_budget_of_the_disk(seed: int) -> None:
    rng = random.Random(seed)
    images = [image(f"i{i}", rng.randint(5, 15), base=f"base{i % 4}") for i in range(24)]
    engine = FakeImageEngine(images, pull_s=0.001)
    order = [image.name for _ in range(3) for image in rng.sample(images, len(images))]
    held: list[str] = []
    slots = asyncio.Semaphore(4)

    async def sample(name: str) -> None:
        try:
            async with store.lease(name):
                held.append(name)
                await asyncio.sleep(rng.random() * 0.004)
                assert set(held) <= engine.disk.keys()
                held.remove(name)
        finally:
            store.finished(name)
            slots.release()

    async with store_of(engine, budget_bytes=180, prefetch=2, max_pulls=3) as store:
        store.expect(order)
        async with asyncio.TaskGroup() as group:
            for name in order:
                await slots.acquire()
                store.started(name)
                group.create_task(sample(name))
    assert engine.peak_bytes <= 180
    assert engine.pulled_bytes > 0
