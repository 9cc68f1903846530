"""What sandboxes of waiting programs take up, over fakes, and what the pressure on a node asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.resting_contract import (  # noqa: F401
    test_files_and_diff_are_the_same_after_a_rest,
    test_one_that_rests_is_stopped_like_any_and_one_that_is_stopped_cannot_rest,
    test_rests_follow_each_other_and_nothing_wakes_what_is_awake,
)
from tests.support.sandbox_contract import MakeSandbox
from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.pressure import Pressure, read_pressure, rest_under
from thunder_rollout.sandbox.protocol import ExecResult, Rest, SandboxSpec
from thunder_rollout.sandbox.resting import RestingSandboxes

DONE = ExecResult(exit_code=0, output="", timed_out=False, took_s=0.0)
IDLE = Pressure(cpu=0.0, free_memory=0.9)
BUSY = Pressure(cpu=0.9, free_memory=0.9)
SHORT = Pressure(cpu=0.0, free_memory=0.05)


@pytest.fixture
def make() -> MakeSandbox:
    return lambda spec: FakeSandbox(spec, lambda command: DONE)


class Node:
    """Whose pressure a test sets."""

    def __init__(self, when_paused: str = "auto") -> None:
        self.pressure = IDLE
        self.resting = RestingSandboxes(when_paused, pressure=lambda: self.pressure, look_every_s=0.005)

    async def box(self) -> FakeSandbox:
        box = FakeSandbox(SandboxSpec(image=""), lambda command: DONE)
        await box.start()
        return box


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    following = asyncio.create_task(node.resting.run())
    yield node
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize("how", list(Rest))
async def test_a_fixed_rule_is_followed_whatever_the_pressure(how: Rest) -> None:
    node = Node(how.name.lower())
    node.pressure = SHORT
    box = await node.box()
    assert await node.resting.rest("p", box) is how is box.resting
    took_s = await node.resting.wake("p")
    assert took_s is not None and took_s >= 0
    assert box.resting is Rest.KEEP
    assert await node.resting.wake("p") is None
    await node.resting.run()


async def test_pressure_that_comes_later_deepens_a_rest_and_spares_who_works(node: Node) -> None:
    waiting, working = await node.box(), await node.box()
    await node.resting.rest("p", waiting)
    await node.resting.rest("q", working)
    assert (waiting.resting, working.resting) == (Rest.KEEP, Rest.KEEP)
    node.resting.forget("q")
    for node.pressure, how in ((BUSY, Rest.FREEZE), (SHORT, Rest.STOP), (IDLE, Rest.STOP)):
        await asyncio.sleep(0.05)
        assert (waiting.resting, working.resting) == (how, Rest.KEEP)


async def test_who_has_waited_longest_gives_up_first_and_only_while_it_is_asked_for(node: Node) -> None:
    boxes = [await node.box() for _ in range(3)]
    for number, box in enumerate(boxes):
        await node.resting.rest(f"p{number}", box)
    asked = iter([SHORT, SHORT])
    node.resting._pressure = lambda: next(asked, IDLE)
    await asyncio.sleep(0.05)
    assert [box.resting for box in boxes] == [Rest.STOP, Rest.STOP, Rest.KEEP]


async def test_one_that_has_died_is_left_to_its_program(node: Node) -> None:
    box = await node.box()
    box.kill()
    node.pressure = SHORT
    assert await node.resting.rest("p", box) is Rest.KEEP
    assert await node.resting.wake("p") is None
    box = await node.box()
    await node.resting.rest("q", box)
    box.kill()
    with pytest.raises(SandboxFailed):
        await node.resting.wake("q")


@pytest.mark.parametrize("trouble", [OSError(24, "Too many open files"), SandboxFailed("the engine refuses")])
async def test_one_in_trouble_keeps_no_other_from_its_rest(node: Node, trouble: Exception) -> None:
    troubled, other = await node.box(), await node.box()
    await node.resting.rest("p", troubled)
    await node.resting.rest("q", other)
    troubled.trouble = trouble
    for node.pressure, how in ((BUSY, Rest.FREEZE), (SHORT, Rest.STOP)):
        await asyncio.sleep(0.05)
        assert other.resting is how
    troubled.trouble = None
    await node.resting.rest("p", troubled)
    assert troubled.resting is Rest.STOP


async def test_a_node_that_does_not_tell_its_pressure_is_asked_again(node: Node) -> None:
    box = await node.box()
    await node.resting.rest("p", box)
    asked = iter([None, None, SHORT])

    def pressure() -> Pressure:
        if (found := next(asked, IDLE)) is None:
            raise OSError(24, "Too many open files")
        return found

    node.resting._pressure = pressure
    await asyncio.sleep(0.05)
    assert box.resting is Rest.STOP


@pytest.mark.parametrize(
    ("cpu", "free_memory", "how"),
    [(0.0, 0.9, Rest.KEEP), (0.5, 0.9, Rest.FREEZE), (0.0, 0.2, Rest.FREEZE), (0.5, 0.05, Rest.STOP)],
)
def test_the_least_that_helps(cpu: float, free_memory: float, how: Rest) -> None:
    assert rest_under(Pressure(cpu=cpu, free_memory=free_memory)) is how


def test_the_pressure_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  250 kB\n")
    assert read_pressure(tmp_path) == Pressure(cpu=0.0, free_memory=0.25)
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "cpu").write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=9\nfull avg10=0.00\n")
    assert read_pressure(tmp_path) == Pressure(cpu=0.125, free_memory=0.25)
    assert 0 < read_pressure().free_memory <= 1
