"""Everything a run needs on Ray, started together and stopped together.

The slow parts (engines, sandbox images, tokenizers) start at the same time. `shutdown` ends a
private Ray cluster and with it every process of the run, whatever state they are in.
"""

from __future__ import annotations

import asyncio
import logging
import os
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from thunder_rollout.config import RolloutConfig
from thunder_rollout.core.events import BackendUp
from thunder_rollout.engine.actor import check_resources, create_engine_actor
from thunder_rollout.engine.protocol import EngineInfo, Sampling
from thunder_rollout.engine.remote import RemoteEngine
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.config import RayConfig
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.worker import SampleOutcome, WorkerConfig
from thunder_rollout.runtime.worker_actor import RemoteWorker, WorkerDied, create_worker
from thunder_rollout.sandbox.actor import create_sandbox_host
from thunder_rollout.sandbox.remote import RemoteSandboxHost
from thunder_rollout.tasks.task import Task

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0


class Cluster:
    """Async context manager; `shutdown` comes after it, also when entering failed."""

    def __init__(self, config: RolloutConfig, store: RunStore, *, images: list[str]) -> None:
        self.config = config
        self.store = store
        self.sandbox_backend = ""
        self._images = images
        self._engines: dict[str, RemoteEngine] = {}
        self._engine_handles: dict[str, Any] = {}
        self._groups: list[PlacementGroup] = []
        self._workers: dict[str, RemoteWorker] = {}
        self._num_workers_made = 0

    async def __aenter__(self) -> Cluster:
        config = self.config
        start_ray(config.ray)
        check_resources(config.engine, config.rollout.num_engines, ray.cluster_resources())
        self._host_handle = create_sandbox_host(config.sandbox, run=self.store.folder.name, owner_pid=os.getpid())
        self._host = RemoteSandboxHost(self._host_handle)
        self._scheduler_handle = create_scheduler_actor(
            config.scheduler,
            trace_path=(self.store.folder / "trace.jsonl").resolve() if config.observe.trace else None,
            host=self._host_handle,
        )
        self.scheduler = RemoteScheduler(self._scheduler_handle)
        async with task_group() as group:
            host = group.create_task(self._host.start(self._images))
            infos = [group.create_task(self._start_engine(f"engine{i}")) for i in range(config.rollout.num_engines)]
            group.create_task(self.scheduler.start())
        self.sandbox_backend = host.result()
        logger.info("sandboxes: %s", self.sandbox_backend)
        self._check_capacity(infos[0].result())
        for name, info in zip(self._engines, (task.result() for task in infos), strict=True):
            up = BackendUp(
                backend=name, generation=0, capacity_tokens=info.capacity_tokens, max_running=info.max_running
            )
            await self.scheduler.post(up)
        self._worker_config = self._make_worker_config(infos[0].result())
        for _ in range(config.rollout.num_workers):
            self._add_worker()
        await asyncio.gather(*(worker.ready() for worker in self._workers.values()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stops = [self._host.stop(), self.scheduler.stop(), *(engine.stop() for engine in self._engines.values())]
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.gather(*stops, return_exceptions=True)
        except TimeoutError:
            logger.warning("some actors did not stop within %.0f s and are killed", STOP_TIMEOUT_S)

    def shutdown(self) -> None:
        """Leave the Ray cluster; a private one ends. Idempotent."""
        for group in self._groups:
            if ray.is_initialized():
                remove_placement_group(group)
        self._groups.clear()
        ray.shutdown()

    async def run_sample(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        """Run one sample on the least busy worker; a worker that dies is replaced."""
        worker = min(self._workers.values(), key=lambda w: w.num_running)
        try:
            return await worker.run(task, key, attempt)
        except WorkerDied:
            if self._workers.pop(worker.name, None) is not None:
                logger.warning("%s died; its samples start again elsewhere", worker.name)
                await self.scheduler.owner_died(worker.name)
                self._add_worker()
            raise

    async def num_sandboxes(self) -> int:
        return await self._host.num_running()

    async def _start_engine(self, name: str) -> EngineInfo:
        engine = self.config.engine
        group = placement_group([engine.resources()], strategy="STRICT_PACK")
        self._groups.append(group)
        handle = create_engine_actor(engine, name=f"{self.store.folder.name}/{name}", placement_group=group)
        self._engine_handles[name] = handle
        self._engines[name] = RemoteEngine(handle)
        return await self._engines[name].start()

    def _check_capacity(self, info: EngineInfo) -> None:
        longest = min(self.config.agent.max_context_tokens, info.max_model_len)
        if info.capacity_tokens < longest:
            raise ConfigError(
                f"engine.kv_cache_tokens: the engine holds {info.capacity_tokens} KV tokens, less than the "
                f"longest turn ({longest}); raise it, or lower agent.max_context_tokens or engine.max_model_len"
            )

    def _make_worker_config(self, info: EngineInfo) -> WorkerConfig:
        rollout = self.config.rollout
        return WorkerConfig(
            run=self.store.folder.name,
            model=self.config.engine.model,
            agent=self.config.agent,
            sampling=Sampling(max_tokens=1, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k),
            max_model_len=info.max_model_len,
            limits=self.config.sandbox.limits,
            sandbox_backend=self.sandbox_backend,
            block_size=info.block_size if self.config.scheduler.uses_block_hashes else None,
        )

    def _add_worker(self) -> None:
        name = f"worker{self._num_workers_made}"
        self._num_workers_made += 1
        self._workers[name] = create_worker(
            name,
            self._worker_config,
            scheduler=self._scheduler_handle,
            engines=self._engine_handles,
            host=self._host_handle,
            folder=self.store.folder.resolve(),
            concurrency=self.config.rollout.concurrency,
        )


def start_ray(settings: RayConfig) -> None:
    """Join `ray.address`, or start a private cluster without dashboard or usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    private = settings.address is None
    try:
        ray.init(
            address=settings.address or "local",
            num_cpus=settings.num_cpus if private else None,
            num_gpus=settings.num_gpus if private else None,
            include_dashboard=False if private else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise ConfigError(
            f"ray.address={settings.address!r}: no Ray cluster answers there; start one (see launch/) or leave it "
            "null for a private one"
        ) from error
