"""The scheduler's Ray actor, and the port that talks to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendStats, Event, TurnRequested
from thunder_rollout.errors import InfrastructureFailure
from thunder_rollout.observe.metrics import MetricsSnapshot
from thunder_rollout.observe.trace import TraceWriter
from thunder_rollout.remote import remote_call
from thunder_rollout.runtime.aio import SharedWaits
from thunder_rollout.runtime.service import Grant, SchedulerService
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.remote import FleetHandles, RemoteSandboxHosts

# Every waiting program holds one call; Ray's default of 1,000 would block the releases behind them.
MAX_CONCURRENCY = 100_000


class SchedulerDied(InfrastructureFailure):
    kind = "scheduler_died"


class SchedulerActor:
    """`SchedulerService` in a process of its own; adds nothing to it."""

    def __init__(self, config: SchedulerConfig, trace_path: str | None, hosts: FleetHandles | None) -> None:
        self._service = SchedulerService(
            config,
            sandboxes=RemoteSandboxHosts(hosts) if hosts else None,
            trace=TraceWriter(Path(trace_path)) if trace_path else None,
        )

    async def start(self) -> None:
        await self._service.start()

    async def stop(self) -> None:
        await self._service.stop()

    async def announce(self, program: str, task_kind: str | None, sandbox: SandboxSpec) -> None:
        self._service.announce(program, task_kind=task_kind, sandbox=sandbox)

    async def open(self, program: str, owner: str, sandbox: SandboxSpec | None) -> None:
        self._service.open(program, owner=owner, sandbox=sandbox)

    async def admit(self, event: TurnRequested) -> Grant:
        return await self._service.admit(event)

    async def post(self, event: Event) -> None:
        self._service.handle(event)

    async def report(self, stats: BackendStats) -> bool:
        return self._service.report(stats)

    async def close(self, program: str, reason: str | None) -> None:
        self._service.close(program, reason=reason)

    async def until_down(self, backend: str, generation: int) -> None:
        await self._service.until_down(backend, generation)

    async def owner_died(self, owner: str) -> None:
        self._service.owner_died(owner)

    async def metrics(self) -> MetricsSnapshot:
        return self._service.metrics()


def create_scheduler_actor(config: SchedulerConfig, *, trace_path: Path | None, hosts: FleetHandles | None) -> Any:
    """Start the one scheduler actor, on the caller's node, where the trace is written; `hosts` are the
    sandbox hosts' actor handles, if any."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    cls = ray.remote(num_cpus=0, max_concurrency=MAX_CONCURRENCY, scheduling_strategy=here)(SchedulerActor)
    return cls.remote(config, str(trace_path) if trace_path else None, hosts)


class RemoteScheduler:
    """`SchedulerPort` on the actor's handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._downs = SharedWaits[tuple[str, int]]()

    async def start(self) -> None:
        await self._call(self._handle.start.remote())

    async def stop(self) -> None:
        await self._call(self._handle.stop.remote())

    async def announce(self, program: str, *, task_kind: str | None, sandbox: SandboxSpec) -> None:
        await self._call(self._handle.announce.remote(program, task_kind, sandbox))

    async def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None:
        await self._call(self._handle.open.remote(program, owner, sandbox))

    async def admit(self, event: TurnRequested) -> Grant:
        grant: Grant = await self._call(self._handle.admit.remote(event))
        return grant

    async def post(self, event: Event) -> None:
        await self._call(self._handle.post.remote(event))

    async def report(self, stats: BackendStats) -> bool:
        is_up: bool = await self._call(self._handle.report.remote(stats))
        return is_up

    async def close(self, program: str, *, reason: str | None = None) -> None:
        await self._call(self._handle.close.remote(program, reason))

    async def until_down(self, backend: str, generation: int) -> None:
        """One call for all that wait for the same here: every turn in flight does."""
        await self._downs.wait((backend, generation), lambda: self._until_down(backend, generation))

    async def _until_down(self, backend: str, generation: int) -> None:
        await self._call(self._handle.until_down.remote(backend, generation))

    async def owner_died(self, owner: str) -> None:
        await self._call(self._handle.owner_died.remote(owner))

    async def metrics(self) -> MetricsSnapshot:
        snapshot: MetricsSnapshot = await self._call(self._handle.metrics.remote())
        return snapshot

    async def _call(self, ref: Any) -> Any:
        return await remote_call(ref, died=SchedulerDied, what="the scheduler actor")
