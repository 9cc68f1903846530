"""Turns whose engine is silently gone: the scheduler's word on it is enough."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.failing_engines import SUPERVISED, LocalHost, Run, play, supervised_run
from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.core.events import BackendDown
from thunder_rollout.engine.protocol import EngineInfo, EngineStats, GenerateRequest, Generation, Sampling
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.runtime.aio import SharedWaits
from thunder_rollout.runtime.client import LAST_WORD_S

PROMPTS = [[1 + number, *range(100, 300)] for number in range(6)]


class OnANode(LocalHost):
    """When the node is `gone` nothing answers any more, also not who waits already."""

    gone = False

    async def start(self) -> EngineInfo:
        if self.gone:
            await asyncio.Event().wait()
        return await super().start()

    async def generate(self, request: GenerateRequest) -> Generation:
        generation = await super().generate(request)
        if self.gone:
            await asyncio.Event().wait()
        return generation

    async def stats(self) -> EngineStats:
        if self.gone:
            await asyncio.Event().wait()
        return await super().stats()

    def kill(self) -> None:
        """There is nobody to kill."""


async def play_all(run: Run) -> list[list[list[int]]]:
    return await asyncio.gather(*(play(run.client(f"p{i}"), prompt) for i, prompt in enumerate(PROMPTS)))


def test_turns_on_a_node_that_is_gone_move_as_soon_as_the_supervisor_has_missed_it() -> None:
    async def main(lose_a_node: bool) -> tuple[list[list[list[int]]], float]:
        loop = asyncio.get_running_loop()
        async with supervised_run(make_host=OnANode) as run:
            started_s = loop.time()
            playing = asyncio.create_task(play_all(run))
            await asyncio.sleep(0.5)
            host = run.hosts["engine0"]
            assert isinstance(host, OnANode)
            host.gone = lose_a_node
            return await playing, loop.time() - started_s

    undisturbed, usual_s = run_in_virtual_time(main(lose_a_node=False))
    outputs, took_s = run_in_virtual_time(main(lose_a_node=True))
    assert outputs == undisturbed
    noticed_s = SUPERVISED.report_s + SUPERVISED.hang_s + LAST_WORD_S
    assert took_s < 2 * usual_s + noticed_s + 1.0


def test_what_an_engine_that_hangs_cost_a_turn_is_not_time_of_its_agent() -> None:
    async def main(fault: bool) -> TurnResult:
        async with supervised_run(1) as run, run.client("p") as client:
            turn = asyncio.create_task(client.turn([1, 2, 3], Sampling(max_tokens=500, ignore_eos=True)))
            await asyncio.sleep(0.1)
            if fault:
                run.hosts["engine0"].engines[-1].hang()
            return await turn

    usual, late = run_in_virtual_time(main(fault=False)), run_in_virtual_time(main(fault=True))
    assert late.engine_s > usual.engine_s + SUPERVISED.hang_s
    at_work = [result.generation.prefill_s + result.generation.decode_s for result in (usual, late)]
    assert at_work[0] == pytest.approx(at_work[1])


def test_a_turn_on_an_engine_that_leaves_may_finish_there() -> None:
    async def main() -> str:
        async with supervised_run(1) as run, run.client("p") as client:
            turn = asyncio.create_task(client.turn([1, 2, 3], Sampling(max_tokens=500, ignore_eos=True)))
            await asyncio.sleep(0.1)
            run.service.handle(BackendDown(backend="engine0", generation=0, reason="it leaves the run"))
            return (await turn).backend

    assert run_in_virtual_time(main()) == "engine0"


async def test_waits_for_one_thing_share_one_call_that_ends_with_the_last_of_them() -> None:
    calls: list[str] = []

    async def call() -> None:
        calls.append("made")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise

    waits: SharedWaits[str] = SharedWaits()
    tasks = [asyncio.create_task(waits.wait("it", call)) for _ in range(3)]
    await asyncio.sleep(0)
    for number, task in enumerate(tasks):
        await asyncio.sleep(0)
        assert calls == ["made"], f"{number} of 3 have left"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert calls == ["made", "cancelled"]
