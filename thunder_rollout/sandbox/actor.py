"""The Ray actors around `SandboxHost`, one a node, and around `SandboxFleet`, one a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.config import BackendChoice, SandboxConfig
from thunder_rollout.sandbox.fleet import SandboxFleet
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.placement import HostStats
from thunder_rollout.sandbox.protocol import ExecResult, SandboxSpec
from thunder_rollout.sandbox.remote import FleetHandles, RemoteSandboxHost

MAX_CONCURRENCY = 100_000  # every command that runs holds one call


class SandboxHostActor:
    """`SandboxHost` in a process of its own. Ray restarts a dead actor, without its host: `start` it."""

    def __init__(self, config: SandboxConfig, run: str, owner_pid: int | None) -> None:
        self._config, self._run, self._owner_pid = config, run, owner_pid
        self._host: SandboxHost | None = None

    async def pid(self) -> int:
        return os.getpid()

    async def start(self, images: list[str]) -> BackendChoice:
        if self._host is not None:  # an earlier start that nobody heard the end of
            await self._host.stop()
        self._host = SandboxHost(self._config, run=self._run, owner_pid=self._owner_pid)
        return await self._host.start(images)

    async def stop(self) -> None:
        if self._host is not None:
            await self._host.stop()

    async def expect(self, images: list[str]) -> None:
        self._started().expect(images)

    async def sample_started(self, image: str) -> None:
        self._started().sample_started(image)

    async def sample_finished(self, image: str) -> None:
        self._started().sample_finished(image)

    async def prepare(self, program: str, spec: SandboxSpec, within_s: float) -> float:
        return await self._started().prepare(program, spec, within_s=within_s)

    async def acquire(self, program: str, spec: SandboxSpec) -> float:
        return await self._started().acquire(program, spec)

    async def release(self, program: str) -> None:
        if self._host is not None:
            await self._host.release(program)

    async def rest(self, program: str) -> bool:
        return await self._started().rest(program)

    async def wake(self, program: str) -> None:
        await self._started().wake(program)

    async def exec(self, program: str, command: str, timeout_s: float) -> ExecResult:
        return await self._started().exec(program, command, timeout_s=timeout_s)

    async def read_file(self, program: str, path: str) -> bytes:
        return await self._started().read_file(program, path)

    async def write_file(self, program: str, path: str, content: bytes) -> None:
        await self._started().write_file(program, path, content)

    async def diff(self, program: str, base_commit: str) -> bytes:
        return await self._started().diff(program, base_commit)

    async def heartbeat(self) -> None:
        if self._host is not None:
            self._host.heartbeat()

    async def clear(self, program: str) -> None:
        await self._started().clear(program)

    async def stats(self) -> HostStats:
        return self._started().stats()

    def _started(self) -> SandboxHost:
        if self._host is None:
            raise SandboxFailed("sandbox: its host is new, and has nothing yet; start the program again")
        return self._host


class FleetActor:
    """`SandboxFleet` in a process of its own; adds nothing to it."""

    def __init__(self, hosts: tuple[Any, ...]) -> None:
        self._fleet = SandboxFleet([RemoteSandboxHost(handle) for handle in hosts])

    async def start(self, images: list[str]) -> None:
        await self._fleet.start(images)

    async def stop(self) -> None:
        await self._fleet.stop()

    async def place(self, program: str, image: str, disk_bytes: int) -> int:
        return self._fleet.place(program, image, disk_bytes)

    async def forget(self, program: str) -> int | None:
        return self._fleet.forget(program)

    async def locate(self, program: str) -> int | None:
        return self._fleet.locate(program)

    async def suspect(self, host: int) -> None:
        await self._fleet.suspect(host)

    async def num_running(self) -> int:
        return self._fleet.num_running()

    async def expect(self, images: list[str]) -> None:
        self._fleet.expect(images)

    async def sample_started(self, image: str) -> None:
        self._fleet.sample_started(image)

    async def sample_finished(self, image: str) -> None:
        self._fleet.sample_finished(image)


def create_sandbox_host(
    config: SandboxConfig, *, run: str, owner_pid: int | None = None, node_id: str | None = None
) -> Any:
    """Start the host of a node (the caller's by default). The sandboxes go when the process
    `owner_pid`, which must be on that node, does, or the actor itself; without one, when heartbeats
    stop."""
    node = NodeAffinitySchedulingStrategy(node_id or ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_concurrency": MAX_CONCURRENCY,
        "scheduling_strategy": node,
        "max_restarts": -1,
        # uvloop forks, which copies the page tables of a whole Ray worker for each process; asyncio vforks.
        "runtime_env": {"env_vars": {"RAY_USE_UVLOOP": "0"}},
    }
    return ray.remote(SandboxHostActor).options(**options).remote(config, run, owner_pid)


def create_sandbox_fleet(config: SandboxConfig, *, run: str, owner_pid: int) -> FleetHandles:
    """Start one host on each node that is alive now, and the fleet on the caller's; `owner_pid` is a
    process of the caller's node."""
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    return fleet_of(
        create_sandbox_host(config, run=run, owner_pid=owner_pid if node == here else None, node_id=node)
        for node in nodes
    )


def fleet_of(hosts: Iterable[Any]) -> FleetHandles:
    """Start the fleet over host actors (several may be on one node)."""
    handles = tuple(hosts)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    cls = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY, scheduling_strategy=here)(FleetActor)
    return FleetHandles(fleet=cls.remote(handles), hosts=handles)
