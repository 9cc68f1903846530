"""An engine's processes and its owner's: neither outlives the other unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.engine.host import EngineHost
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.scratch import PREFIX, Scratch
from thunder_rollout.engine.vllm import VllmEngine
from thunder_rollout.errors import EngineDied

GONE_WITHIN_S = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset("qwen2_test", tmp_path_factory.mktemp("model")).path


def engine_processes() -> set[int]:
    """Our descendants, without the dead and Python's own helper."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder for an engine, of a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_no_process_outlives_its_killed_owner_and_no_file_the_next_start(model: Path, temporary: Path) -> None:
    command = [sys.executable, "-m", "tests.support.engine_owner", str(model)]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        pids: list[int] = []
        for line in owner.stdout:
            if line.startswith("pids"):
                pids = [int(word) for word in line.split()[1:]]
                break
        owner.send_signal(signal.SIGKILL)
    assert len(pids) >= 2, "the engine core and its worker"
    deadline = time.monotonic() + GONE_WITHIN_S
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.2)
    assert [path.name.startswith(PREFIX) for path in temporary.iterdir()] == [True], list(temporary.iterdir())
    Scratch(temporary).close()
    assert not list(temporary.iterdir())


async def test_a_dead_engine_core_is_an_engine_died(model: Path) -> None:
    engine = VllmEngine(replace(CONFIG, model=str(model)))
    before = engine_processes()
    await engine.start()
    try:
        turns = [asyncio.create_task(run(engine, new_prompt(100), max_tokens=1500)) for _ in range(4)]
        await asyncio.sleep(0.5)
        for pid in engine_processes() - before:
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            failures = await asyncio.gather(*turns, return_exceptions=True)
            assert all(isinstance(failure, EngineDied) for failure in failures), failures
            with pytest.raises(EngineDied, match="was killed by SIGKILL"):
                await run(engine, new_prompt(10))
    finally:
        await engine.stop()
    await engine.stop()


async def test_a_worker_process_that_is_killed_blames_no_turn(model: Path) -> None:
    engine = VllmEngine(replace(CONFIG, model=str(model), distributed_executor_backend="mp"))
    host = EngineHost(lambda: engine, hang_s=20.0)
    before = engine_processes()
    await host.start()
    try:
        turns = [asyncio.create_task(run(host, new_prompt(100), max_tokens=1500)) for _ in range(2)]
        await asyncio.sleep(0.5)
        (core,) = engine._engine.engine_core.resources.engine_manager.processes
        (worker,) = psutil.Process(core.pid).children()
        assert list(engine._scratch.path.glob("vllm_dist_*"))
        worker.kill()
        async with asyncio.timeout(30):
            failures = await asyncio.gather(*turns, return_exceptions=True)
        assert all(isinstance(failure, EngineDied) and not failure.by_turn for failure in failures), failures
    finally:
        await host.stop()
    assert not engine_processes() - before
    assert not engine._scratch.path.exists()


async def test_a_cancelled_start_leaves_nothing(model: Path) -> None:
    engine = VllmEngine(replace(CONFIG, model=str(model)))
    before = engine_processes()
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await engine.stop()
    with pytest.raises(EngineDied):
        await run(engine, [1])
    deadline = time.monotonic() + GONE_WITHIN_S  # a killed process takes a moment to go
    while alive := engine_processes() - before:
        assert time.monotonic() < deadline, f"still there: {alive}"
        await asyncio.sleep(0.1)
