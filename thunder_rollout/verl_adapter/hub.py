"""What the agent loops of a job have in common: the sandbox hosts of all nodes, and a count of failures.

There is one a job, found by its name; whoever needs it first starts it. It owns the hosts, so that they and
their sandboxes end with it, and it with the process that started it. An agent loop that finds the hosts gone
asks again, and gets those of a new hub where the old one is dead.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.remote import remote_call
from thunder_rollout.sandbox.actor import create_sandbox_fleet
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.remote import FleetHandles, RemoteSandboxHosts

MAX_CONCURRENCY = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The sandbox hosts that run. `backend` is docker or local."""

    run: str
    handles: FleetHandles
    backend: str


class Hub:
    """All methods run on one event loop. `open_fleet` starts the hosts for tasks of these images; the task it
    gives keeps them alive until it is cancelled."""

    def __init__(self, open_fleet: Callable[[list[str]], Awaitable[tuple[Fleet, asyncio.Task[None]]]]) -> None:
        self._open_fleet = open_fleet
        self._opening = asyncio.Lock()
        self._fleet: Fleet | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._failures: Counter[str] = Counter()

    async def fleet(self, images: list[str]) -> Fleet:
        """Started by the first caller. Raises `ConfigError`, `SandboxFailed`."""
        async with self._opening:
            if self._fleet is None:
                self._fleet, self._keeping = await self._open_fleet(images)
            return self._fleet

    def count_failure(self, kind: str) -> None:
        self._failures[kind] += 1

    def failures(self) -> dict[str, int]:
        """Totals by kind."""
        return dict(self._failures)


class HubActor:
    """`Hub` in a process of its own; adds nothing to it."""

    def __init__(self, config: SandboxConfig) -> None:
        self._hub = Hub(lambda images: _open_fleet(config, images))

    async def fleet(self, images: list[str]) -> Fleet:
        return await self._hub.fleet(images)

    async def count_failure(self, kind: str) -> None:
        self._hub.count_failure(kind)

    async def failures(self) -> dict[str, int]:
        return self._hub.failures()


class RemoteHub:
    """The job's hub by its name, started if there is none. `config` is that of the hosts."""

    def __init__(self, config: SandboxConfig) -> None:
        cls = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY)(HubActor)
        self._handle = cls.options(name=hub_name(), get_if_exists=True).remote(config)

    async def fleet(self, images: list[str]) -> Fleet:
        """See `Hub.fleet`; a dead hub is `SandboxFailed`."""
        fleet: Fleet = await remote_call(self._handle.fleet.remote(images), died=SandboxFailed, what="the sandbox hub")
        return fleet

    def count_failure(self, kind: str) -> None:
        """Nobody waits for it."""
        self._handle.count_failure.remote(kind)


def hub_name() -> str:
    """Of this job, for several may share a namespace."""
    return f"thunder_rollout/hub/{ray.get_runtime_context().get_job_id()}"


def find_hub() -> Any | None:
    """The handle of the job's hub, if anybody started it."""
    try:
        return ray.get_actor(hub_name())
    except ValueError:
        return None


async def _open_fleet(config: SandboxConfig, images: list[str]) -> tuple[Fleet, asyncio.Task[None]]:
    run = f"verl-{uuid.uuid4().hex[:12]}"
    handles = create_sandbox_fleet(config, run=run, owner_pid=os.getpid())
    hosts = RemoteSandboxHosts(handles)
    backend = await hosts.start(images)
    keeping = asyncio.create_task(hosts.keep_alive(), name="keep sandboxes alive")
    return Fleet(run=run, handles=handles, backend=backend), keeping
