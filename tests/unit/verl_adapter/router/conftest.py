"""A router over fake replicas, and its clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from thunder_rollout.core.config import AdaptiveConfig, SchedulerConfig
from thunder_rollout.verl_adapter.router.config import RouterConfig
from thunder_rollout.verl_adapter.router.fake import FakeReplica
from thunder_rollout.verl_adapter.router.router import Router

ADAPTIVE = AdaptiveConfig(silent_ends=True, prior_growth=0.0, least_fill=1.0)  # room is what contexts leave


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0  # as any monotonic clock, it does not begin with the router

    def __call__(self) -> float:
        return self.now


class Shell:
    """`router` over the replicas `replicas`, by name; nothing polls but `poll`."""

    def __init__(self, names: str, config: dict[str, Any], **facts: Any) -> None:
        self.clock = Clock()
        self.replicas = {name: FakeReplica(f"handle of {name}", **facts) for name in names.split()}
        scheduler = config.pop("scheduler", SchedulerConfig(tick_s=1000.0, adaptive=ADAPTIVE))
        settings = {"router_class": "any", "scheduler": scheduler, "poll_s": 1000.0, **config}
        self.router = Router(dict(self.replicas), RouterConfig(**settings), clock=self.clock)

    async def acquire(self, request_id: str, num_tokens: int = 100, **sampling: Any) -> str:
        """The server; each request id has a prompt of its own, that grows with `num_tokens`."""
        server, _port = await self.router.acquire(request_id, prompt(request_id, num_tokens), sampling)
        return server

    async def held(self, request_id: str, num_tokens: int = 100) -> asyncio.Task[str]:
        task = asyncio.create_task(self.acquire(request_id, num_tokens))
        await settle()
        return task

    async def release(self, server: str, request_id: str) -> None:
        self.router.release(server, request_id)
        await settle()

    async def poll(self, after_s: float = 0.0) -> None:
        self.clock.now += after_s
        await self.router.poll()

    async def until_granted(self, held: asyncio.Task[str]) -> str:
        """As time goes by, 200 s at most."""
        for _ in range(200):
            self.clock.now += 1.0
            await asyncio.sleep(0.01)
            if held.done():
                break
        return await held

    @property
    def scheduler(self) -> Any:
        return self.router._service.metrics().scheduler

    @property
    def core(self) -> Any:
        return self.router._service._scheduler._state


def prompt(name: str, num_tokens: int) -> list[int]:
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 50_000
    return [(seed + place * 7) % 60_000 for place in range(num_tokens)]


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


MakeShell = Callable[..., Awaitable[Shell]]


@pytest.fixture
async def make_shell() -> AsyncIterator[Callable[..., Shell]]:
    shells: list[Shell] = []

    def make(names: str = "a b", *, facts: dict[str, Any] | None = None, **config: Any) -> Shell:
        shells.append(Shell(names, config, **(facts or {})))
        return shells[-1]

    yield make
    for shell in shells:
        await shell.router.stop()
