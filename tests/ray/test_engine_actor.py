from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file

from tests.support.engine_contract import CONFIG, new_prompt, new_request, run, settled
from thunder_rollout.engine.actor import create_engine_actor
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.engine.remote import RemoteEngine, shared
from thunder_rollout.engine.weights import MemoryWeights, files_of
from thunder_rollout.errors import EngineDied, RequestError

FAKE = replace(CONFIG, kind="fake", model="fake", num_cpus=0.1)
GONE_WITHIN_S = 20

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
async def handle() -> AsyncIterator[Any]:
    actor = create_engine_actor(FAKE, name="engine0")
    await RemoteEngine(actor).start()
    yield actor
    ray.kill(actor)


@pytest.fixture
def engine(handle: Any) -> RemoteEngine:
    return RemoteEngine(handle)


async def test_turns_come_through(engine: RemoteEngine) -> None:
    generations = await asyncio.gather(*(run(engine, new_prompt(50)) for _ in range(50)))
    assert all(len(generation.token_ids) == 20 for generation in generations)
    assert (await settled(engine)).output_tokens == 1000
    await engine.reset_prefix_cache()


async def test_errors_keep_their_type_and_words(engine: RemoteEngine) -> None:
    with pytest.raises(RequestError, match="prompt_ids: is empty"):
        await run(engine, [])
    await engine.abort("no-such-request")


async def test_a_new_start_begins_with_a_new_engine(engine: RemoteEngine) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(50), max_tokens=1900))
    await asyncio.sleep(0.2)
    await engine.start()
    with pytest.raises(EngineDied) as caught:
        await turn
    assert not caught.value.by_turn
    assert (await engine.stats()).num_steps == 0


async def test_cancelling_the_wait_aborts_the_turn(engine: RemoteEngine) -> None:
    for delay_s in (0.0, 0.2):
        turn = asyncio.create_task(run(engine, new_prompt(50), max_tokens=1900))
        await asyncio.sleep(delay_s)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        await asyncio.sleep(0.1)
        assert (await settled(engine)).output_tokens < 1900


async def test_abort_reaches_the_actor(engine: RemoteEngine) -> None:
    request = new_request(new_prompt(50), max_tokens=1900)
    turn = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.3)
    await engine.abort(request.request_id)
    assert (await turn).finish_reason == "abort"


async def test_a_dead_actor_is_an_engine_died(handle: Any, engine: RemoteEngine) -> None:
    turn = asyncio.create_task(run(engine, new_prompt(50), max_tokens=1900))
    await asyncio.sleep(0.2)
    ray.kill(handle)
    with pytest.raises(EngineDied):
        await turn
    with pytest.raises(EngineDied):
        await engine.stats()
    await engine.stop()


async def test_it_lives_in_its_placement_group() -> None:
    group = placement_group([{"CPU": 1}, FAKE.resources()], strategy="STRICT_PACK")
    actor = create_engine_actor(FAKE, name="engine0", placement_group=group, bundle_index=1)
    await RemoteEngine(actor).start()
    remove_placement_group(group)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(_stats_until_dead(RemoteEngine(actor)), timeout=20)


async def _stats_until_dead(engine: RemoteEngine) -> None:
    while True:
        await engine.stats()


def test_weights_in_rays_store_are_files_in_another_process() -> None:
    tensors = {f"t{number}": torch.full((100,), number, dtype=torch.float32) for number in range(5)}
    source = shared(tensors, bucket_bytes=1000)
    assert isinstance(source, MemoryWeights)
    assert len(source.buckets) == 3
    assert ray.get(ray.remote(means_of).remote(source)) == {f"t{number}": float(number) for number in range(5)}


def means_of(source: MemoryWeights) -> dict[str, float]:
    means: dict[str, float] = {}
    for file in files_of(source):
        with file as path:
            means |= {name: tensor.mean().item() for name, tensor in load_file(path).items()}
    return means


@pytest.mark.vllm
def test_no_engine_process_outlives_a_killed_driver(tmp_path: Path) -> None:
    """A driver with its own Ray cluster, actor and real engine is killed with -9."""
    model = write_preset("qwen2_test", tmp_path / "model").path
    command = [sys.executable, "-m", "tests.support.engine_driver", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids: list[int] = []
        for line in driver.stdout:
            if line.startswith("pids"):
                pids = [int(word) for word in line.split()[1:]]
                break
        driver.send_signal(signal.SIGKILL)
    assert len(pids) >= 5, "raylet, its store, the actor, the engine core and its worker"
    deadline = time.monotonic() + GONE_WITHIN_S
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.2)
