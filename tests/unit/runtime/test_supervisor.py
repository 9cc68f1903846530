"""One engine under watch: what the scheduler hears of it."""

from __future__ import annotations

import asyncio

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.core.events import BackendStats, BackendUp, Event
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.runtime.supervisor import EngineSupervisor


class RecordingScheduler:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def post(self, event: Event) -> None:
        self.events.append(event)


def test_the_scheduler_hears_what_an_engine_holds() -> None:
    async def main() -> list[Event]:
        engine, scheduler = FakeEngine(CONFIG), RecordingScheduler()
        supervisor = EngineSupervisor("e0", engine, scheduler, await engine.start(), report_s=1.0)
        await supervisor.announce()
        watching = asyncio.create_task(supervisor.run())
        turn = asyncio.create_task(run(engine, new_prompt(1000), max_tokens=1000))
        await asyncio.sleep(1.5)
        turn.cancel()
        watching.cancel()
        await engine.stop()
        return scheduler.events

    up, stats = run_in_virtual_time(main())
    assert up == BackendUp(backend="e0", generation=0, capacity_tokens=4096, max_running=16, block_size=32)
    assert isinstance(stats, BackendStats)
    assert (stats.backend, stats.generation, stats.running, stats.waiting) == ("e0", 0, 1, 0)
    assert stats.used_tokens is not None and stats.used_tokens >= 1000
