"""`FakeReplica`: a replica that is what a test says it is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from thunder_rollout.errors import EngineDied
from thunder_rollout.verl_adapter.router.replica import ReplicaFacts, ReplicaState


class FakeReplica:
    """Tests set what it tells with `become`, and read how often it was asked from `num_reads`."""

    def __init__(self, handle: Any, *, capacity_tokens: int = 10_000, **facts: Any) -> None:
        self.handle = handle
        self.num_reads = 0
        self._facts = ReplicaFacts(
            **{"capacity_tokens": capacity_tokens, "max_running": 64, "block_size": 16, "validation": None, **facts}
        )
        self._state = ReplicaState(version=0, prompt_lengths=None)
        self._is_dead = False
        self._refusal: Exception | None = None
        self._answers = asyncio.Event()
        self._answers.set()

    async def facts(self) -> ReplicaFacts:
        await self._answers.wait()
        self._check_alive()
        if self._refusal is not None:
            raise self._refusal
        return self._facts

    async def state(self) -> ReplicaState:
        self.num_reads += 1
        await self._answers.wait()
        self._check_alive()
        return self._state

    def become(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    def fall_silent(self) -> None:
        """Until `answer`, whoever asks waits."""
        self._answers.clear()

    def answer(self) -> None:
        self._answers.set()

    def refuse(self, error: Exception) -> None:
        """What `facts` raises from now on."""
        self._refusal = error

    def die(self) -> None:
        self._is_dead = True

    def _check_alive(self) -> None:
        if self._is_dead:
            raise EngineDied(f"replica {self.handle} is gone")
