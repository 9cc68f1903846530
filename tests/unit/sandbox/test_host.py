"""`SandboxHost` over fakes: events of one program in every order, cancellation at every await."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable

import pytest
from docker.errors import APIError

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.config import ImagesConfig, SandboxConfig
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.fake_images import FakeImageEngine
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.image_cache import Image, Layer
from thunder_rollout.sandbox.image_store import ImageStore
from thunder_rollout.sandbox.protocol import ExecResult, Rest, SandboxLimits, SandboxSpec
from thunder_rollout.sandbox.resting import RestingSandboxes

SPEC = SandboxSpec(image="toy", files={"/testbed/a": b"1\n"}, labels={"task": "t"})


class Factory:
    """Makes fakes and remembers them."""

    def __init__(self, start_s: float = 0.0, errors: int = 0, error: Exception | None = None) -> None:
        self.made: list[FakeSandbox] = []
        self._start_s = start_s
        self._errors = errors
        self._error = error or SandboxFailed("no luck")
        self.max_starting = 0

    def __call__(self, spec: SandboxSpec) -> FakeSandbox:
        error = self._error if len(self.made) < self._errors else None
        answer: Callable[[str], ExecResult] = lambda command: ExecResult(
            exit_code=0, output=command, timed_out=False, took_s=0.0
        )
        self.made.append(FakeSandbox(spec, answer, start_s=self._start_s, start_error=error))
        return self.made[-1]

    def num_running(self) -> int:
        return sum(fake.running for fake in self.made)


async def host_of(factory: Factory, **config: object) -> SandboxHost:
    host = SandboxHost(SandboxConfig(**config), run="r", make=factory)
    await host.start()
    return host


async def test_acquire_takes_the_prepared_one() -> None:
    factory = Factory()
    host = await host_of(factory)
    await host.prepare("p", SPEC)
    await host.acquire("p", SPEC)
    assert len(factory.made) == 1
    assert (await host.exec("p", "hi", timeout_s=1)).output == "hi"
    assert factory.made[0].spec.labels | {"session": ""} == {"task": "t", "run": "r", "program": "p", "session": ""}


async def test_prepare_and_acquire_at_once_start_one() -> None:
    factory = Factory(start_s=0.01)
    host = await host_of(factory)
    await asyncio.gather(*(host.prepare("p", SPEC) for _ in range(5)), *(host.acquire("p", SPEC) for _ in range(5)))
    assert len(factory.made) == 1
    assert host.stats().num_running == 1


async def test_starts_are_bounded() -> None:
    factory = Factory(start_s=0.01)
    host = await host_of(factory, max_starts=2)
    starts = [asyncio.create_task(host.prepare(f"p{i}", SPEC)) for i in range(6)]
    await asyncio.sleep(0.015)
    assert factory.num_running() == 2
    assert host.stats().num_starting == 4
    await asyncio.gather(*starts)
    assert factory.num_running() == 6


async def test_starts_that_wait_go_in_the_order_of_need() -> None:
    factory = Factory(start_s=0.01)
    host = await host_of(factory, max_starts=1)
    starts = [
        asyncio.create_task(host.prepare(f"p{i}", SPEC, within_s=within_s)) for i, within_s in enumerate([9, 5, 7])
    ]
    await asyncio.sleep(0.001)
    starts.append(asyncio.create_task(host.acquire("p2", SPEC)))
    began: list[str] = []
    while len(began) < 3:
        began += [name for fake in factory.made if fake.running and (name := fake.spec.labels["program"]) not in began]
        await asyncio.sleep(0.001)
    assert began == ["p0", "p2", "p1"], "whoever stands waiting needs it now"
    await asyncio.gather(*starts)


async def test_a_prepared_sandbox_that_died_is_not_handed_over() -> None:
    factory = Factory()
    host = await host_of(factory)
    await host.prepare("p", SPEC)
    factory.made[0].kill()
    await asyncio.gather(host.acquire("p", SPEC), host.acquire("p", SPEC))
    assert (await host.exec("p", "hi", timeout_s=1)).output == "hi"
    assert len(factory.made) == 2
    factory.made[1].kill()
    await host.acquire("p", SPEC)
    with pytest.raises(SandboxFailed):
        await host.exec("p", "hi", timeout_s=1)
    assert len(factory.made) == 2, "one that died in use takes its program's work with it"


async def test_files_and_diff_go_to_the_programs_own() -> None:
    host = await host_of(Factory())
    await asyncio.gather(host.prepare("p", SPEC), host.prepare("q", SPEC))
    await host.write_file("p", "/testbed/a", b"2\n")
    assert await host.read_file("p", "/testbed/a") == b"2\n"
    assert await host.read_file("q", "/testbed/a") == b"1\n"
    assert b"+2" in await host.diff("p", "HEAD")
    assert await host.diff("q", "HEAD") == b""


async def test_release_is_idempotent_and_the_next_acquire_starts_anew() -> None:
    factory = Factory()
    host = await host_of(factory)
    await host.acquire("p", SPEC)
    await asyncio.gather(host.release("p"), host.release("p"))
    await host.release("p")
    assert factory.num_running() == 0
    with pytest.raises(SandboxFailed, match="program=p"):
        await host.exec("p", "hi", timeout_s=1)
    await host.acquire("p", SPEC)
    assert len(factory.made) == 2


@pytest.mark.parametrize("max_starts", [1, 4])
async def test_release_while_starting_or_queued_cancels_it(max_starts: int) -> None:
    factory = Factory(start_s=0.05)
    host = await host_of(factory, max_starts=max_starts)
    waiting = [asyncio.create_task(host.acquire(f"p{i}", SPEC)) for i in range(3)]
    await asyncio.sleep(0.01)
    await asyncio.gather(*(host.release(f"p{i}") for i in range(3)))
    for task in waiting:
        with pytest.raises(SandboxFailed, match="released"):
            await task
    assert factory.num_running() == 0
    assert host.stats().num_starting == 0
    await host.acquire("again", SPEC)


async def test_cancelling_a_waiter_leaves_the_sandbox_to_the_program() -> None:
    factory = Factory(start_s=0.02)
    host = await host_of(factory)
    waiting = asyncio.create_task(host.prepare("p", SPEC))
    await asyncio.sleep(0.005)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await host.acquire("p", SPEC)
    assert len(factory.made) == 1


async def test_a_failed_start_reaches_its_waiters_and_the_next_try_is_new() -> None:
    factory = Factory(errors=1)
    host = await host_of(factory)
    for outcome in await asyncio.gather(*(host.acquire("p", SPEC) for _ in range(2)), return_exceptions=True):
        assert isinstance(outcome, SandboxFailed)
    await host.acquire("p", SPEC)
    assert (host.stats().num_failed, host.stats().num_started) == (1, 1)


TROUBLES = [OSError(errno.EMFILE, "Too many open files"), TimeoutError(), APIError("no space left on device")]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
async def test_trouble_of_the_machine_or_the_engine_fails_its_program_and_no_other(trouble: OSError) -> None:
    factory = Factory(errors=1, error=trouble)
    host = await host_of(factory, when_paused="stop")
    with pytest.raises(SandboxFailed, match=type(trouble).__name__):
        await host.prepare("p", SPEC)
    assert host.stats().num_failed == 1
    await asyncio.gather(host.acquire("p", SPEC), host.prepare("q", SPEC))
    for fake in factory.made:
        fake.trouble = trouble
    await host.rest("p")
    for call in (
        lambda: host.wake("p"),
        lambda: host.exec("p", "hi", timeout_s=1),
        lambda: host.read_file("p", "/testbed/a"),
        lambda: host.write_file("p", "/testbed/a", b""),
        lambda: host.diff("p", "HEAD"),
        lambda: host.clear("p"),
        lambda: host.acquire("q", SPEC),
    ):
        with pytest.raises(SandboxFailed, match=type(trouble).__name__):
            await call()
    for fake in factory.made:
        fake.trouble = None
    with pytest.raises(FileNotFoundError):
        await host.read_file("p", "/testbed/missing")
    assert (await host.exec("p", "hi", timeout_s=1)).output == "hi"
    await host.stop()


async def test_a_bug_in_the_watch_of_the_pressure_is_told_to_whoever_rests_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: RestingSandboxes) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(RestingSandboxes, "run", broken)
    host = await host_of(Factory())
    await host.acquire("p", SPEC)
    with pytest.raises(ZeroDivisionError):
        await host.rest("p")
    await host.stop()


async def test_a_fresh_sandbox_ends_with_its_block() -> None:
    factory = Factory()
    host = await host_of(factory)
    with contextlib.suppress(ZeroDivisionError):
        async with host.fresh(SPEC) as box:
            assert (await box.exec("hi", timeout_s=1)).output == "hi"
            raise ZeroDivisionError
    assert factory.num_running() == 0
    assert host.stats().num_running == 0


async def test_cancelling_a_fresh_one_while_it_starts_leaves_nothing() -> None:
    factory = Factory(start_s=0.02)
    host = await host_of(factory)

    async def use() -> None:
        async with host.fresh(SPEC):
            pytest.fail("never reached")

    using = asyncio.create_task(use())
    await asyncio.sleep(0.005)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    await asyncio.sleep(0.03)
    assert factory.num_running() == 0


async def test_stop_takes_everything_down_and_is_final() -> None:
    factory = Factory(start_s=0.01)
    host = await host_of(factory)
    await host.acquire("p", SPEC)
    starting = asyncio.create_task(host.prepare("q", SPEC))
    await asyncio.sleep(0)
    await asyncio.gather(host.stop(), host.stop())
    with pytest.raises(SandboxFailed):
        await starting
    assert factory.num_running() == 0
    with pytest.raises(SandboxFailed, match="not running"):
        await host.acquire("p", SPEC)


TOY = Image(name="toy:latest", layers=(Layer(key="toy", pull_bytes=10, disk_bytes=10),))
OTHER = Image(name="other:latest", layers=(Layer(key="other", pull_bytes=10, disk_bytes=10),))
OTHER_SPEC = SandboxSpec(image="other")


async def host_with_images(
    factory: Factory, engine: FakeImageEngine, budget_bytes: int, *, when_paused: str = "auto"
) -> SandboxHost:
    store = ImageStore(engine, ImagesConfig(budget_bytes=budget_bytes, retry_s=0.001))
    await store.start()
    return SandboxHost(SandboxConfig(when_paused=when_paused), run="r", make=factory, images=store)


async def test_an_image_is_on_the_node_while_a_sandbox_uses_it_and_no_longer_than_needed() -> None:
    engine = FakeImageEngine([TOY, OTHER])
    host = await host_with_images(Factory(), engine, budget_bytes=25)
    await asyncio.gather(host.acquire("p", SPEC), host.acquire("q", SPEC))
    waiting = asyncio.create_task(host.acquire("r", OTHER_SPEC))
    await host.release("p")
    await asyncio.sleep(0.02)
    assert not waiting.done(), "q is still there"
    assert host.stats().images == ("toy:latest",)
    await host.release("q")
    await waiting
    assert host.stats().images == ("other:latest",)
    await host.stop()


async def test_a_sandbox_that_would_not_go_is_tried_again_and_keeps_its_image_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.host.STOP_AGAIN_S", 0.02)
    factory = Factory()
    host = await host_with_images(factory, FakeImageEngine([TOY, OTHER]), budget_bytes=25)
    await host.acquire("p", SPEC)
    factory.made[0].stop_failures = 3
    await host.release("p")
    waiting = asyncio.create_task(host.acquire("q", OTHER_SPEC))
    await asyncio.sleep(0.03)
    assert factory.made[0].running and not waiting.done()
    await waiting
    assert not factory.made[0].running
    await host.stop()


async def test_a_start_that_failed_and_left_something_is_taken_down_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.host.STOP_AGAIN_S", 0.01)
    factory = Factory(start_s=0.01, errors=1)
    host = await host_of(factory)
    starting = asyncio.create_task(host.acquire("p", SPEC))
    await asyncio.sleep(0.005)
    factory.made[0].stop_failures = 1
    with pytest.raises(SandboxFailed, match="no luck"):
        await starting
    await asyncio.sleep(0.05)
    assert factory.made[0].stop_failures == 0
    await host.acquire("p", SPEC)
    factory.made[1].stop_failures = 100
    await host.stop()


async def test_a_program_waits_on_a_full_node_until_another_ends() -> None:
    factory = Factory()
    host = await host_of(factory, max_sandboxes=2)
    await asyncio.gather(host.acquire("p", SPEC), host.acquire("q", SPEC))
    waiting = [asyncio.create_task(host.acquire(name, SPEC)) for name in ("r", "s")]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    assert factory.num_running() == 2
    await host.release("p")
    await waiting[0]
    waiting[1].cancel()
    await host.release("s")
    await host.release("r")
    async with host.fresh(SPEC):
        assert factory.num_running() == 2
    assert host.stats().max_sandboxes == 2
    await host.stop()


@pytest.mark.parametrize("start_s", [0.0, 0.02])
async def test_a_prepared_sandbox_gives_way_on_a_full_node_to_a_program_that_stands_waiting(start_s: float) -> None:
    factory = Factory(start_s=start_s)
    host = await host_of(factory, max_sandboxes=2)
    preparing = [
        asyncio.create_task(host.prepare(name, SPEC, within_s=within_s)) for name, within_s in [("p", 9), ("q", 5)]
    ]
    await asyncio.sleep(0.01)
    later = asyncio.create_task(host.prepare("later", SPEC, within_s=1))
    await asyncio.sleep(0)
    await asyncio.wait_for(host.acquire("r", SPEC), 1)
    if not start_s:
        assert factory.num_running() == 2, "no more give way than have to"
    await asyncio.wait_for(host.acquire("s", SPEC), 1)
    await asyncio.gather(*preparing)
    assert not later.done(), "those in need go first"
    assert {fake.spec.labels["program"] for fake in factory.made if fake.running} == {"r", "s"}
    await host.release("r")
    await later
    waiting = asyncio.create_task(host.acquire("q", SPEC))
    await asyncio.wait_for(waiting, 1)
    assert {fake.spec.labels["program"] for fake in factory.made if fake.running} == {"q", "s"}
    await host.stop()


async def test_a_node_on_which_nothing_ends_is_a_typed_failure() -> None:
    factory = Factory()
    host = await host_of(factory, max_sandboxes=1, limits=SandboxLimits(ttl_s=0.02))
    await host.acquire("p", SPEC)
    with pytest.raises(SandboxFailed, match=r"raise sandbox\.max_sandboxes"):
        await host.acquire("q", SPEC)
    await host.release("p")
    await host.acquire("q", SPEC)
    await host.stop()


async def test_a_sandbox_that_would_not_go_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.sandbox.host.STOP_AGAIN_S", 0.02)
    factory = Factory()
    host = await host_of(factory, max_sandboxes=1)
    await host.acquire("p", SPEC)
    factory.made[0].stop_failures = 1
    await host.release("p")
    await host.acquire("q", SPEC)
    assert [fake.running for fake in factory.made] == [False, True]
    await host.stop()


async def test_the_image_of_a_sandbox_that_was_put_away_stays() -> None:
    engine = FakeImageEngine([TOY, OTHER])
    host = await host_with_images(Factory(), engine, budget_bytes=25, when_paused="stop")
    await host.acquire("p", SPEC)
    assert await host.rest("p")
    waiting = asyncio.create_task(host.acquire("r", OTHER_SPEC))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert host.stats().images == ("toy:latest",)
    await host.release("p")
    await waiting
    await host.stop()


async def test_an_image_that_nobody_has_fails_the_start_and_leaves_no_lease() -> None:
    engine = FakeImageEngine([TOY])
    host = await host_with_images(Factory(errors=2), engine, budget_bytes=25)
    with pytest.raises(SandboxFailed, match="no registry has"):
        await host.acquire("p", OTHER_SPEC)
    with pytest.raises(SandboxFailed, match="no luck"):
        await host.acquire("q", SPEC)
    engine.registry = {"other:latest": OTHER}
    await host.acquire("p", OTHER_SPEC)
    assert host.stats().images == ("other:latest",)
    assert host.stats().num_failed == 2
    await host.stop()


async def test_releasing_a_program_whose_image_is_being_pulled_leaves_no_lease() -> None:
    engine = FakeImageEngine([TOY, OTHER], pull_s=0.03)
    host = await host_with_images(Factory(), engine, budget_bytes=25)
    waiting = asyncio.create_task(host.acquire("p", SPEC))
    await asyncio.sleep(0.01)
    await host.release("p")
    with pytest.raises(SandboxFailed, match="released"):
        await waiting
    await host.acquire("q", OTHER_SPEC)
    assert host.stats().images == ("other:latest",)
    await host.stop()


async def test_a_waiting_programs_sandbox_rests_until_it_is_used_or_prepared_again() -> None:
    factory = Factory()
    host = await host_of(factory, when_paused="stop")
    assert not await host.rest("p"), "it has none"
    await host.prepare("p", SPEC)
    assert not await host.rest("p"), "it was prepared for a grant that is near"
    await host.acquire("p", SPEC)
    [box] = factory.made
    for wake in (
        lambda: host.exec("p", "hi", timeout_s=1),
        lambda: host.read_file("p", "/testbed/a"),
        lambda: host.prepare("p", SPEC),
        lambda: host.wake("p"),
    ):
        assert await host.rest("p")
        assert box.resting is Rest.STOP
        await wake()
        assert box.resting is Rest.KEEP
    await host.rest("p")
    await host.release("p")
    assert not await host.rest("p")
    await host.wake("p")
    await host.stop()
