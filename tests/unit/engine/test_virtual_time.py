from __future__ import annotations

import asyncio
import time

import pytest

from thunder_rollout.engine.virtual_time import run_in_virtual_time


def test_hours_pass_at_once_and_in_order() -> None:
    log: list[tuple[str, float]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        log.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(wait("late", 7200), wait("early", 1), wait("middle", 60))

    began = time.monotonic()
    run_in_virtual_time(main())
    assert time.monotonic() - began < 5
    assert [(name, round(at)) for name, at in log] == [("early", 1), ("middle", 60), ("late", 7200)]


def test_timeouts_follow() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(main()) == pytest.approx(100)
