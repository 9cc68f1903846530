"""The watch over fake parts: what is lost is told to whoever asks, and a trainer that waits for it in vain is ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from thunder_rollout.verl_adapter import watch as module
from thunder_rollout.verl_adapter.watch import MAX_LOOKS, RolloutDied, Watch, is_inside


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_S", 0.0)


@dataclass
class Part:
    """Gone from its `dies_at`th look on."""

    name: str = "a"
    dies_at: int = 1_000_000
    error: Exception | None = None
    num_looks: int = 0

    async def look(self) -> None:
        self.num_looks += 1
        if self.num_looks >= self.dies_at:
            raise self.error or RolloutDied(f"{self.name} was killed")


@dataclass
class Trainer:
    """`waits` are the answers to whether it waits in vain, the last one from then on."""

    waits: list[bool] = field(default_factory=lambda: [False])
    num_asked: int = 0
    ended: list[str] = field(default_factory=list)

    def waits_in_vain(self) -> bool:
        self.num_asked += 1
        return self.waits[min(self.num_asked, len(self.waits)) - 1]


@contextlib.asynccontextmanager
async def watching(trainer: Trainer, *parts: Part) -> AsyncIterator[Watch]:
    watch = Watch([part.look for part in parts], waits_in_vain=trainer.waits_in_vain, end=trainer.ended.append)
    task = asyncio.create_task(watch.run())
    yield watch
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


def reasons(watch: Watch) -> str:
    try:
        watch.check()
    except RolloutDied as error:
        return str(error)
    return ""


async def test_each_part_that_is_gone_is_told_with_its_reason_and_the_remedy() -> None:
    well = Part()
    async with watching(Trainer(), Part(dies_at=3), well, Part("c", dies_at=5)) as watch:
        await until(lambda: "a was killed; c was killed" in reasons(watch))
        assert "trainer.resume_mode=auto" in reasons(watch)
        looks = well.num_looks
        await until(lambda: well.num_looks > looks)


async def test_while_all_live_nobody_is_told_and_no_wait_is_ended() -> None:
    part, trainer = Part(), Trainer(waits=[True])
    async with watching(trainer, part) as watch:
        await until(lambda: part.num_looks > 10 * MAX_LOOKS)
        assert (reasons(watch), trainer.ended) == ("", [])


async def test_a_trainer_that_waits_for_what_is_lost_is_ended_with_the_reason() -> None:
    trainer = Trainer(waits=[True])
    async with watching(trainer, Part(dies_at=1)) as watch:
        await until(lambda: trainer.ended)
        assert trainer.ended == [reasons(watch)]
        assert trainer.num_asked == MAX_LOOKS


async def test_a_wait_that_ended_by_itself_does_not_count() -> None:
    waits = [*[True] * (MAX_LOOKS - 1), False, *[True] * (MAX_LOOKS - 1), False]
    trainer = Trainer(waits=waits)
    async with watching(trainer, Part(dies_at=1)):
        await until(lambda: trainer.num_asked > 2 * len(waits))
        assert trainer.ended == []


async def test_a_watch_that_breaks_says_so() -> None:
    async with watching(Trainer(), Part(dies_at=2, error=ValueError("a bug"))) as watch:
        await until(lambda: reasons(watch))
        assert "watch" in reasons(watch)
        assert "a bug" in reasons(watch)


def test_a_thread_is_found_inside_a_function_through_its_wrapper_and_callees() -> None:
    entered, leave = threading.Event(), threading.Event()

    def callee() -> None:
        entered.set()
        leave.wait()

    async def endless() -> None:
        callee()

    @functools.wraps(endless)
    def wrapped() -> None:
        asyncio.run(endless())

    thread = threading.Thread(target=wrapped)
    thread.start()
    entered.wait()
    assert is_inside([test_a_watch_that_breaks_says_so, wrapped])
    assert not is_inside([test_a_watch_that_breaks_says_so])
    leave.set()
    thread.join()
    assert not is_inside([wrapped])


def test_a_process_is_ended_with_its_reason_whatever_its_main_thread_does() -> None:
    script = """
import threading
from thunder_rollout.verl_adapter import watch
watch.LAST_WORDS_S = 0.0
threading.Timer(0.1, watch.end_process, ["replica 0 is gone"]).start()
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "RolloutDied: replica 0 is gone" in done.stderr) == (1, True)
