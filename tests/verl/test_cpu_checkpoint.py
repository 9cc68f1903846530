"""Weights from a trainer's ranks to rollout workers, over verl's own steps of an update."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from thunder_rollout.verl_adapter.cpu_checkpoint import GlooCheckpointEngine

TIED = torch.arange(4.0)
WEIGHTS = {
    "embed": TIED,
    "lm_head": TIED,  # the same memory
    "bfloat16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "larger_than_a_bucket": torch.arange(100.0),
    "last": torch.tensor(1.0),
}


@pytest.fixture(autouse=True)
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def update(
    actors: list[GlooCheckpointEngine], rollouts: list[GlooCheckpointEngine], weights: dict[str, torch.Tensor]
) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """What each rollout worker got, and how many weights each of the trainer's ranks has made."""
    made = [0] * len(actors)

    def make(rank: int) -> Any:
        for item in weights.items():
            made[rank] += 1
            yield item

    async def receive(engine: GlooCheckpointEngine) -> dict[str, torch.Tensor]:
        return {name: weight async for name, weight in engine.receive_weights(global_steps=1)}

    engines = actors + rollouts
    metadata = [engine.prepare() for engine in engines]
    kwargs = GlooCheckpointEngine.build_topology(len(actors), len(rollouts), metadata)
    each = [
        {name: values[i] for name, values in side.items()}
        for side, count in zip(kwargs, (len(actors), len(rollouts)), strict=True)
        for i in range(count)
    ]
    with ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(lambda engine, given: engine.init_process_group(**given), engines, each))
        sent = [threads.submit(asyncio.run, engine.send_weights(make(rank))) for rank, engine in enumerate(actors)]
        received = [threads.submit(asyncio.run, receive(engine)) for engine in rollouts]
        for future in sent:
            future.result()
        results = [future.result() for future in received]
    for engine in engines:
        engine.finalize()
    return results, made


@pytest.mark.parametrize("bucket_size", [1, 64, 1 << 20])
def test_every_rollout_worker_gets_every_weight(bucket_size: int) -> None:
    actors = [GlooCheckpointEngine(bucket_size, is_master=rank == 0) for rank in range(2)]
    rollouts = [GlooCheckpointEngine(bucket_size) for _ in range(2)]
    results, made = update(actors, rollouts, WEIGHTS)
    for weights in results:
        assert weights.keys() == WEIGHTS.keys()
        for name, weight in weights.items():
            assert weight.dtype == WEIGHTS[name].dtype
            assert torch.equal(weight, WEIGHTS[name])
    assert made == [len(WEIGHTS)] * 2  # the rank that sends nothing, too: it takes part in making them


def test_replicas_may_join_between_updates() -> None:
    actors, rollouts = [GlooCheckpointEngine(64, is_master=True)], [GlooCheckpointEngine(64)]
    update(actors, rollouts, WEIGHTS)
    rollouts.append(GlooCheckpointEngine(64))
    results, _ = update(actors, rollouts, {"w": torch.ones(2)})
    assert [weights["w"].tolist() for weights in results] == [[1.0, 1.0]] * 2


def test_verl_finds_it_by_name() -> None:
    assert isinstance(CheckpointEngineRegistry.new("gloo", bucket_size=1), GlooCheckpointEngine)
