"""Weights from verl's trainer to rollouts of their own (`separate_async`) without a GPU: the checkpoint engine `gloo`.

verl 0.9.1's engines for this (nccl, nixl, ...) need an accelerator or RDMA. A user names both:
`actor_rollout_ref.rollout.checkpoint_engine.backend=gloo` and
`actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=thunder_rollout.verl_adapter.cpu_checkpoint`.

One group an update: the trainer's rank 0 and every rollout worker, so replicas may come and go in between. Rank 0
broadcasts buckets of about `update_weights_bucket_megabytes` (each: its length in bytes, then safetensors) and ends
with an empty one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import ray
import safetensors.torch
import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

NAME = "gloo"
_TIMEOUT = timedelta(minutes=5)  # for the slowest member; verl's loading of a bucket counts


@CheckpointEngineRegistry.register(NAME)
class GlooCheckpointEngine(CheckpointEngine):
    """verl makes one in each trainer rank and in each rollout worker; `is_master` in rank 0 alone.

    bucket_size: bytes after which a bucket is sent; a larger tensor is sent whole.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._store: TCPStore | None = None
        self._group: ProcessGroupGloo | None = None

    def prepare(self) -> tuple[str, int] | None:
        """Host and port of the group's store, from the master alone."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        return host, self._store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[tuple[str, int] | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 of the trainer, then the rollout workers; the trainer's others (-1) stay out."""

        def kwargs(ranks: list[int]) -> dict[str, list[Any]]:
            count = len(ranks)
            return {
                "rank": ranks,
                "world_size": [1 + rollout_world_size] * count,
                "address": [metadata[0]] * count,
            }

        actors = [0] + [-1] * (actor_wg_world_size - 1)
        return kwargs(actors), kwargs([1 + worker for worker in range(rollout_world_size)])

    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:
        if rank < 0:
            return
        if self._store is None:
            self._store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
        self._group = ProcessGroupGloo(self._store, rank, world_size, _TIMEOUT)

    def finalize(self) -> None:
        self._group = self._store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name, weight in weights:  # by every rank: making a whole tensor of its shards is collective
            if self._group is None:
                continue
            bucket[name] = weight.detach().cpu().contiguous().clone()  # tied weights share memory, safetensors refuses
            size += weight.nbytes
            if size >= self.bucket_size:
                await asyncio.to_thread(self._send, bucket)
                bucket, size = {}, 0
        if self._group is not None:
            await asyncio.to_thread(self._send, bucket)
            if bucket:
                await asyncio.to_thread(self._send, {})

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        while bucket := await asyncio.to_thread(self._receive):
            for name, weight in bucket.items():
                yield name, weight

    def _send(self, bucket: dict[str, torch.Tensor]) -> None:
        data = safetensors.torch.save(bucket) if bucket else b""
        self._broadcast(torch.tensor([len(data)]))
        if data:
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _receive(self) -> dict[str, torch.Tensor]:
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        if not length.item():
            return {}
        data = torch.empty(int(length.item()), dtype=torch.uint8)
        self._broadcast(data)
        return safetensors.torch.load(data.numpy().tobytes())

    def _broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0, in place. RuntimeError where the group has lost a member."""
        assert self._group is not None, "verl calls init_process_group first"
        self._group.broadcast(tensor, 0).wait()
