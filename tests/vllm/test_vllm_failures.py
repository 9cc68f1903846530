"""A real engine core that is killed, that hangs and that fails, under load and under a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.engine_contract import CONFIG, VOCAB_SIZE, new_prompt, run
from tests.support.failing_engines import Run, check_that_an_update_finds_a_hang, play, supervised_run
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.vllm import VllmEngine
from thunder_rollout.engine.weights import FolderWeights, UpdateMode
from thunder_rollout.errors import EngineDied

NUM_TURNS, MAX_TOKENS = 6, 150


def core_pid(engine: VllmEngine) -> int:
    (process,) = engine._engine.engine_core.resources.engine_manager.processes
    return process.pid


async def restarted(run: Run, generation: int) -> float:
    """Seconds until the engine serves in that generation."""
    began = time.monotonic()
    async with asyncio.timeout(90):
        while run.supervisors["engine0"].generation < generation:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.timeout(300)
async def test_programs_outlive_a_killed_and_a_hanging_engine_core(tmp_path: Path) -> None:
    config = replace(CONFIG, model=str(write_preset("qwen2_test", tmp_path).path), hang_s=3.0)
    async with supervised_run(1, lambda: VllmEngine(config), config) as fleet:
        playing = [
            asyncio.create_task(
                play(fleet.client(f"p{number}"), new_prompt(200), num_turns=NUM_TURNS, max_tokens=MAX_TOKENS)
            )
            for number in range(8)
        ]
        cores = []
        for generation, fault in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            await asyncio.sleep(1.5)
            assert not all(task.done() for task in playing), "nothing was running any more"
            cores.append(core_pid(fleet.hosts["engine0"].engines[-1]))
            os.kill(cores[-1], fault)
            took_s = await restarted(fleet, generation)
            print(f"{fault.name}: up again after {took_s:.1f} s")
        for outputs in await asyncio.gather(*playing):
            assert [len(output) for output in outputs] == [MAX_TOKENS] * NUM_TURNS
            assert all(0 <= token < VOCAB_SIZE for output in outputs for token in output)
        assert fleet.supervisors["engine0"].num_restarts == 2
        for pid in cores:
            with contextlib.suppress(psutil.NoSuchProcess):
                assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "a hung core must not keep its memory"

        turn = asyncio.create_task(run(fleet.hosts["engine0"], new_prompt(100), max_tokens=1500))
        await asyncio.sleep(0.5)
        os.kill(core_pid(fleet.hosts["engine0"].engines[-1]), signal.SIGSEGV)
        with pytest.raises(EngineDied, match="was killed by SIGSEGV") as caught:
            await turn
        assert caught.value.by_turn, "nobody sends that from outside"


async def is_gone(pid: int) -> bool:
    """Within some seconds: a killed process is there until its memory is freed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(100):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
            await asyncio.sleep(0.1)
        return False
    return True


async def test_an_update_finds_a_hang_that_no_turn_shows_any_more(tmp_path: Path) -> None:
    """By KEEP alone: to an engine CUT is the same, and the host's own tests have both."""
    model = str(write_preset("qwen2_test", tmp_path).path)
    engine = VllmEngine(replace(CONFIG, model=model, hang_s=3.0))
    await engine.start()
    try:
        await run(engine, new_prompt(100))
        pid = core_pid(engine)
        await check_that_an_update_finds_a_hang(
            engine, lambda: os.kill(pid, signal.SIGSTOP), FolderWeights(path=model), UpdateMode.KEEP, hang_s=3.0
        )
    finally:
        await engine.stop()
    assert await is_gone(pid), "a hung core must not keep its memory"
