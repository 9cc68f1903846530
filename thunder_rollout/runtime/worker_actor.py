"""The Ray actor around `RolloutWorker`, and how the driver calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import InfrastructureFailure
from thunder_rollout.remote import remote_call
from thunder_rollout.runtime.actor import RemoteScheduler
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.worker import RolloutWorker, SampleOutcome, WorkerConfig
from thunder_rollout.sandbox.remote import RemoteSandboxHost
from thunder_rollout.tasks.task import Task


class WorkerDied(InfrastructureFailure):
    kind = "worker_died"


class WorkerActor:
    """Loads the tokenizer once; adds nothing else to `RolloutWorker`."""

    def __init__(
        self, name: str, config: WorkerConfig, scheduler: Any, engines: dict[str, Any], host: Any, folder: str
    ) -> None:
        from transformers import AutoTokenizer  # seconds to import; only this process needs it

        self._worker = RolloutWorker(
            name,
            config,
            ChatFormat(AutoTokenizer.from_pretrained(config.model)),
            RemoteScheduler(scheduler),
            {engine: RemoteEngine(handle) for engine, handle in engines.items()},
            RemoteSandboxHost(host),
            RunStore(Path(folder)),
        )

    async def ready(self) -> None:
        pass

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        return await self._worker.run(task, key, attempt)


class RemoteWorker:
    """One worker actor by its name."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.num_running = 0
        self._handle = handle

    async def ready(self) -> None:
        await self._call(self._handle.ready.remote())

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        self.num_running += 1
        try:
            outcome: SampleOutcome = await self._call(self._handle.run.remote(task, key, attempt))
            return outcome
        finally:
            self.num_running -= 1

    async def _call(self, ref: Any) -> Any:
        return await remote_call(ref, died=WorkerDied, what=f"rollout worker {self.name}")


def create_worker(
    name: str,
    config: WorkerConfig,
    *,
    scheduler: Any,
    engines: dict[str, Any],
    host: Any,
    folder: Path,
    concurrency: int,
) -> RemoteWorker:
    cls = ray.remote(num_cpus=0, max_concurrency=concurrency + 1)(WorkerActor)
    return RemoteWorker(name, cls.remote(name, config, scheduler, engines, host, str(folder)))
