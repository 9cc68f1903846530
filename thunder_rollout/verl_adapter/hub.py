"""What the agent loops of a job have in common: the sandbox hosts of all nodes, and figures of the machinery.

There is one a job, found by its name; whoever needs it first starts it. It owns the hosts, so that they and
their sandboxes end with it, and it with the process that started it. An agent loop that finds the hosts gone
asks again, and gets those of a new hub where the old one is dead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from thunder_rollout.errors import SandboxFailed, Stale
from thunder_rollout.remote import remote_call
from thunder_rollout.sandbox.actor import create_sandbox_fleet
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.remote import FleetHandles, RemoteSandboxHosts

logger = logging.getLogger(__name__)

MAX_CONCURRENCY = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The sandbox hosts that run. `backend` is docker or local."""

    run: str
    handles: FleetHandles
    backend: str


class HostsPort(Protocol):
    """What the hub asks of the hosts; see `RemoteSandboxHosts`."""

    async def keep_alive(self) -> None: ...

    async def num_running(self) -> int: ...

    async def any_lives(self) -> bool:
        """Whether a program can still be placed."""

    def expect(self, images: list[str]) -> None: ...

    def sample_started(self, image: str) -> None: ...

    def sample_finished(self, image: str) -> None: ...


class Hub:
    """All methods run on one event loop. `open_fleet` starts the hosts for tasks of these images; `hosts_of` is
    their port."""

    def __init__(
        self,
        open_fleet: Callable[[list[str]], Awaitable[Fleet]],
        hosts_of: Callable[[FleetHandles], HostsPort],
    ) -> None:
        self._open_fleet = open_fleet
        self._hosts_of = hosts_of
        self._opening = asyncio.Lock()
        self._fleet: Fleet | None = None
        self._hosts: HostsPort | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._images: list[str] = []  # of the samples to come, in their order
        self._failures: Counter[str] = Counter()

    async def fleet(self, images: list[str]) -> Fleet:
        """Started by the first caller, and again by one that comes when all hosts are gone. Raises `ConfigError`,
        `SandboxFailed`."""
        async with self._opening:
            if self._hosts is None or not await self._hosts.any_lives():
                if self._keeping is not None:
                    logger.warning("every sandbox host is gone; starting them again")
                    self._keeping.cancel()
                self._fleet = await self._open_fleet(images)
                self._hosts = self._hosts_of(self._fleet.handles)
                self._keeping = asyncio.create_task(self._hosts.keep_alive(), name="keep sandboxes alive")
                self._hosts.expect(self._images)
            assert self._fleet is not None
            return self._fleet

    def expect(self, images: list[str]) -> None:
        """So many more samples will come, in this order: what hosts pull ahead and keep."""
        self._images += images
        if self._hosts is not None:
            self._hosts.expect(self._images)

    def sample_started(self, image: str) -> None:
        if image in self._images:
            self._images.remove(image)
        if self._hosts is not None:
            self._hosts.sample_started(image)

    def sample_finished(self, image: str) -> None:
        if self._hosts is not None:
            self._hosts.sample_finished(image)

    def count_failure(self, kind: str) -> None:
        self._failures[kind] += 1

    async def figures(self) -> dict[str, float]:
        """Failures since the last call, and sandboxes now."""
        failures, self._failures = self._failures, Counter()
        values = {"thunder/stale": float(failures.pop(Stale.kind, 0))}  # the trainer's doing, not a failure
        values |= {f"thunder/failures/{kind}": float(count) for kind, count in failures.items()}
        values["thunder/failures/all"] = float(failures.total())
        if self._hosts is not None and await self._hosts.any_lives():
            values["thunder/sandboxes"] = float(await self._hosts.num_running())
        return values


class FleetHosts(RemoteSandboxHosts):
    """The hosts as the hub sees them."""

    async def any_lives(self) -> bool:
        try:
            await self.num_running()
        except SandboxFailed:
            return False  # nobody places programs any more
        answers = await asyncio.gather(*(host.stats() for host in self._hosts), return_exceptions=True)
        return not all(isinstance(answer, BaseException) for answer in answers)


class HubActor:
    """`Hub` in a process of its own; adds nothing to it."""

    def __init__(self, config: SandboxConfig) -> None:
        self._hub = Hub(lambda images: _open_fleet(config, images), FleetHosts)

    async def fleet(self, images: list[str]) -> Fleet:
        return await self._hub.fleet(images)

    async def expect(self, images: list[str]) -> None:
        self._hub.expect(images)

    async def sample_started(self, image: str) -> None:
        self._hub.sample_started(image)

    async def sample_finished(self, image: str) -> None:
        self._hub.sample_finished(image)

    async def count_failure(self, kind: str) -> None:
        self._hub.count_failure(kind)

    async def figures(self) -> dict[str, float]:
        return await self._hub.figures()


class HubDied(SandboxFailed):
    """The job's hub is gone, and every sandbox of the job with it."""


class RemoteHub:
    """The job's hub by its name, started if there is none. `config` is that of the hosts. Keep it: to Ray the
    actor is alive as long as whoever started it holds on to this very handle."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._handle = self._found_or_started()

    async def fleet(self, images: list[str]) -> Fleet:
        """See `Hub.fleet`, of a new hub if the one that was is dead. Raises `HubDied` if that dies too."""
        try:
            return await self._fleet(images)
        except HubDied:
            self._handle = await asyncio.to_thread(self._found_or_started)
            return await self._fleet(images)

    async def _fleet(self, images: list[str]) -> Fleet:
        fleet: Fleet = await remote_call(self._handle.fleet.remote(images), died=HubDied, what="the sandbox hub")
        return fleet

    def _found_or_started(self) -> Any:
        cls = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY)(HubActor)
        return cls.options(name=hub_name(), get_if_exists=True).remote(self._config)

    def expect(self, images: list[str]) -> None:
        """See `Hub.expect`, of the hub there is by now. This and the others are hints: nobody waits for them."""
        found = find_hub()
        if found is None:
            self._handle = self._found_or_started()
        elif found._actor_id != self._handle._actor_id:  # what was started here is dead, and replaced elsewhere
            self._handle = found
        self._handle.expect.remote(images)

    def sample_started(self, image: str) -> None:
        self._handle.sample_started.remote(image)

    def sample_finished(self, image: str) -> None:
        self._handle.sample_finished.remote(image)

    def count_failure(self, kind: str) -> None:
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


async def _open_fleet(config: SandboxConfig, images: list[str]) -> Fleet:
    run = f"verl-{uuid.uuid4().hex[:12]}"
    handles = create_sandbox_fleet(config, run=run, owner_pid=os.getpid())
    backend = await RemoteSandboxHosts(handles).start(images)
    return Fleet(run=run, handles=handles, backend=backend)
