from __future__ import annotations

import asyncio

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.runtime.lazy_sandbox import LazySandbox
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.protocol import SandboxSpec

SPEC = SandboxSpec(image="i")


async def test_it_starts_at_its_first_use_and_says_how_long_that_took() -> None:
    inner = FakeSandbox(SPEC, start_s=0.1)
    box = LazySandbox(inner)
    assert not inner.running
    await box.exec("true", timeout_s=1)
    await box.exec("true", timeout_s=1)
    assert box.started and 0.05 < box.wait_s < 5


async def test_a_start_that_began_ahead_costs_no_wait() -> None:
    box = LazySandbox(FakeSandbox(SPEC, start_s=0.1))
    box.begin()
    await asyncio.sleep(0.2)
    await box.start()
    assert box.wait_s < 0.05


async def test_a_start_that_fails_tells_its_user() -> None:
    box = LazySandbox(FakeSandbox(SPEC, start_error=SandboxFailed("no room")))
    box.begin()
    await asyncio.sleep(0)
    with pytest.raises(SandboxFailed, match="no room"):
        await box.start()
    await box.stop()


async def test_stopping_ends_a_start_under_way_and_nothing_that_never_began() -> None:
    inner = FakeSandbox(SPEC, start_s=100)
    box = LazySandbox(inner)
    await box.stop()
    box.begin()
    await asyncio.sleep(0)
    await box.stop()
    await box.stop()
    with pytest.raises(SandboxFailed):
        await inner.start()
