"""What every sandbox does while its program waits: `from tests.support.resting_contract import *` beside
`sandbox_contract`. The first three need no processes, and run on a fake too."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.support.sandbox_contract import LIMITS, SPEC, MakeSandbox, count_processes, started
from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.protocol import HostedSandbox, Rest

TICKS = "while sleep 0.05; do date +%s.%N >> /tmp/ticks; done"
TICKING = f"({TICKS}) > /dev/null 2>&1 & until [ -e /tmp/ticks ]; do sleep 0.1; done"
RESTS = [Rest.FREEZE, Rest.STOP]


@pytest.mark.parametrize("how", list(Rest))
async def test_files_and_diff_are_the_same_after_a_rest(make: MakeSandbox, how: Rest) -> None:
    async with started(make) as box:
        await box.write_file("/testbed/a.py", b"x = 2\n")
        await box.write_file("/root/notes", b"mine")
        patch = await box.diff("HEAD")
        for _ in range(2):
            await box.rest(how)
            assert await box.read_file("/root/notes") == b"mine"
            await box.rest(how)
            assert await box.diff("HEAD") == patch
            await box.rest(how)
            assert (await box.exec("true", timeout_s=10)).exit_code == 0


async def test_rests_follow_each_other_and_nothing_wakes_what_is_awake(make: MakeSandbox) -> None:
    async with started(make) as box:
        for how in (Rest.KEEP, Rest.FREEZE, Rest.FREEZE, Rest.STOP, Rest.FREEZE, Rest.KEEP, Rest.KEEP):
            await box.rest(how)
        assert await box.read_file("/testbed/a.py") == b"x = 1\n"


@pytest.mark.parametrize("how", RESTS)
async def test_one_that_rests_is_stopped_like_any_and_one_that_is_stopped_cannot_rest(
    make: MakeSandbox, how: Rest
) -> None:
    async with started(make) as box:
        await box.rest(how)
        await box.stop()
        with pytest.raises(SandboxFailed):
            await box.rest(how)
        with pytest.raises(SandboxFailed):
            await box.exec("true", timeout_s=1)


async def ticks(box: HostedSandbox) -> list[float]:
    """When each was, in seconds."""
    return [float(line) for line in (await box.read_file("/tmp/ticks")).split()]


async def test_background_processes_survive_keep_and_freeze_and_not_stop(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.exec(TICKING, timeout_s=10)
        await box.rest(Rest.FREEZE)
        await box.rest(Rest.KEEP)
        for _ in range(10):  # an engine may fail at what forks all the time
            if await box.rest(Rest.FREEZE) is Rest.FREEZE:
                break
        await asyncio.sleep(1)
        before = await ticks(box)
        await asyncio.sleep(0.5)
        after = await ticks(box)
        assert len(after) > len(before), "it went on"
        assert max(later - earlier for earlier, later in pairwise(after)) > 0.9, "it stood still"
        await box.rest(Rest.STOP)
        assert await count_processes(box, "sleep") == 0


async def test_a_rest_waits_for_the_command_under_way(make: MakeSandbox) -> None:
    async with started(make) as box:
        running = asyncio.create_task(box.exec("sleep 0.5; echo done", timeout_s=10))
        await asyncio.sleep(0.1)
        await box.rest(Rest.STOP)
        assert running.done() and running.result().output == "done\n"
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_cancelling_a_rest_or_a_waking_leaves_a_working_sandbox(make: MakeSandbox) -> None:
    async with started(make) as box:
        for delay_s in (0.0, 0.01, 0.05):
            for how in (Rest.FREEZE, Rest.STOP, Rest.KEEP):
                call = asyncio.create_task(box.rest(how))
                await asyncio.sleep(delay_s)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
        assert (await box.exec("cat a.py", timeout_s=10)).output == "x = 1\n"
        resting = asyncio.create_task(box.rest(Rest.STOP))
        await asyncio.sleep(0.01)
        resting.cancel()
        await box.stop()


@pytest.mark.parametrize("how", RESTS)
async def test_the_time_to_live_goes_on(make: MakeSandbox, how: Rest) -> None:
    box = make(replace(SPEC, setup="", limits=replace(LIMITS, ttl_s=2.0)))
    await box.start()
    await box.rest(how)
    await asyncio.sleep(2.5)
    with pytest.raises(SandboxFailed):
        await box.exec("true", timeout_s=1)
    await box.stop()


async def test_a_frozen_one_costs_no_cpu_and_wakes_at_once(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.rest(Rest.FREEZE)
        began_s = time.monotonic()
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"
        assert time.monotonic() - began_s < 5, "measured in recipes/paused_sandboxes"
