"""The Ray actor around `RolloutWorker`, and how the driver calls it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.engine.protocol import Engine
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError, InfrastructureFailure
from thunder_rollout.remote import remote_call
from thunder_rollout.runtime.actor import RemoteScheduler
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.worker import RolloutWorker, SampleOutcome, WorkerConfig
from thunder_rollout.sandbox.remote import FleetHandles, RemoteSandboxHosts
from thunder_rollout.tasks.task import Task


class WorkerDied(InfrastructureFailure):
    kind = "worker_died"


class WorkerActor:
    """Loads the tokenizer once; adds nothing else to `RolloutWorker`."""

    def __init__(
        self, name: str, config: WorkerConfig, scheduler: Any, engines: dict[str, Any], hosts: FleetHandles, folder: str
    ) -> None:
        self._engines: dict[str, Engine] = {engine: RemoteEngine(handle) for engine, handle in engines.items()}
        self._make_worker = lambda chat: RolloutWorker(
            name,
            config,
            chat,
            RemoteScheduler(scheduler),
            self._engines,
            RemoteSandboxHosts(hosts),
            RunStore(Path(folder)),
        )
        self._model = config.model
        self._worker: RolloutWorker | None = None
        self._loading = asyncio.Lock()

    async def ready(self) -> None:
        """Load the tokenizer. Raises `ConfigError` if the model has none to chat with."""
        async with self._loading:
            if self._worker is None:
                self._worker = self._make_worker(await asyncio.to_thread(_load_chat, self._model))

    async def know(self, engine: str, handle: Any) -> None:
        """An engine joins the run."""
        self._engines[engine] = RemoteEngine(handle)

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        await self.ready()
        assert self._worker is not None
        return await self._worker.run(task, key, attempt)


def _load_chat(model: str) -> ChatFormat:
    from transformers import AutoTokenizer  # seconds to import; only this process needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.model={model!r}: its tokenizer can't be loaded: {error}") from error
    return ChatFormat(tokenizer)


class RemoteWorker:
    """One worker actor by its name."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.num_running = 0
        self._handle = handle

    async def ready(self) -> None:
        await self._call(self._handle.ready.remote())

    async def know(self, engine: str, handle: Any) -> None:
        await self._call(self._handle.know.remote(engine, handle))

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        self.num_running += 1
        try:
            outcome: SampleOutcome = await self._call(self._handle.run.remote(task, key, attempt))
            return outcome
        finally:
            self.num_running -= 1

    def kill(self) -> None:
        """Make sure that a worker taken for dead is."""
        ray.kill(self._handle)

    async def _call(self, ref: Any) -> Any:
        return await remote_call(ref, died=WorkerDied, what=f"rollout worker {self.name}")


def create_worker(
    name: str,
    config: WorkerConfig,
    *,
    scheduler: Any,
    engines: dict[str, Any],
    hosts: FleetHandles,
    folder: Path,
    concurrency: int,
) -> RemoteWorker:
    cls = ray.remote(num_cpus=0, max_concurrency=concurrency + 2)(WorkerActor)
    return RemoteWorker(name, cls.remote(name, config, scheduler, engines, hosts, str(folder)))
