"""Everything a run needs on Ray, started together and stopped together.

The slow parts (engines, sandbox images, tokenizers) start at the same time. `shutdown` ends a
private Ray cluster and with it every process of the run, whatever state they are in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import ray

from thunder_rollout.config import RolloutConfig
from thunder_rollout.engine.actor import check_resources
from thunder_rollout.engine.protocol import EngineInfo, Sampling
from thunder_rollout.engine.remote import shared
from thunder_rollout.engine.weights import UpdateMode, WeightSource
from thunder_rollout.errors import ConfigError, WeightsRefused
from thunder_rollout.runtime.actor import RemoteScheduler, create_scheduler_actor
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.config import RayConfig
from thunder_rollout.runtime.episode import grader_names
from thunder_rollout.runtime.fleet import EngineFleet
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.weights import UpdateReport, Weights, WeightsFolder
from thunder_rollout.runtime.worker import SampleOutcome, WorkerConfig, program_name
from thunder_rollout.runtime.worker_actor import RemoteWorker, WorkerDied, create_worker
from thunder_rollout.sandbox.actor import create_sandbox_fleet
from thunder_rollout.sandbox.remote import RemoteSandboxHosts
from thunder_rollout.tasks.task import Task

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0
WEIGHTS_POLL_S = 1.0  # rollout.weights_folder is looked at so often


class Cluster:
    """Async context manager; `shutdown` comes after it, also when entering failed."""

    def __init__(self, config: RolloutConfig, store: RunStore, *, tasks: list[Task]) -> None:
        self.config = config
        self.store = store
        self.sandbox_backend = ""
        self._tasks = tasks
        self._workers: dict[str, RemoteWorker] = {}
        self._num_workers_made = 0
        self.fleet: EngineFleet
        self._weights = Weights(mode=config.rollout.update_mode, batch=config.rollout.update_batch)
        folder = config.rollout.weights_folder
        self._weights_folder = WeightsFolder(folder) if folder else None

    async def __aenter__(self) -> Cluster:
        config = self.config
        start_ray(config.ray)
        check_resources(config.engine, config.rollout.num_engines, ray.cluster_resources())
        self._host_handles = create_sandbox_fleet(config.sandbox, run=self.store.run_id, owner_pid=os.getpid())
        self._hosts = RemoteSandboxHosts(self._host_handles)
        self._scheduler_handle = create_scheduler_actor(
            config.scheduler,
            trace_path=(self.store.folder / "trace.jsonl").resolve() if config.observe.trace else None,
            hosts=self._host_handles,
        )
        self.scheduler = RemoteScheduler(self._scheduler_handle)
        self.fleet = EngineFleet(
            config.engine, self.scheduler, prefix=self.store.folder.name, on_join=self._introduce, weights=self._weights
        )
        async with task_group() as group:
            group.create_task(self.fleet.start(config.rollout.num_engines))
            group.create_task(self.scheduler.start())
            group.create_task(self._start_sandboxes())
        infos = [supervisor.info for supervisor in self.fleet.supervisors.values()]
        smallest = min(infos, key=lambda info: info.capacity_tokens)
        self._check_capacity(smallest)
        if self._weights_folder and (newest := self._weights_folder.newest()):
            self._weights.start_with(newest[0], version=newest[1])
        await self.fleet.announce()
        self._worker_config = self._make_worker_config(smallest)
        for _ in range(config.rollout.num_workers):
            self._add_worker()
        await asyncio.gather(*(worker.ready() for worker in self._workers.values()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stops = [self._hosts.stop(), self.scheduler.stop(), self.fleet.stop()]
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.gather(*stops, return_exceptions=True)
        except TimeoutError:
            logger.warning("some actors did not stop within %.0f s and are killed", STOP_TIMEOUT_S)

    def shutdown(self) -> None:
        """Leave the Ray cluster; a private one ends. Idempotent."""
        if (fleet := getattr(self, "fleet", None)) is not None:
            fleet.shutdown()
        ray.shutdown()

    async def run_sample(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        """Run one sample on the least busy worker; a worker that dies is replaced."""
        worker = min(self._workers.values(), key=lambda w: w.num_running)
        try:
            return await worker.run(task, key, attempt)
        except WorkerDied:
            if self._workers.pop(worker.name, None) is not None:
                logger.warning("%s died; its samples start again elsewhere", worker.name)
                self._add_worker()
                worker.kill()
                await self.scheduler.owner_died(worker.name)
            await self.scheduler.close(program_name(key, attempt))  # if it was announced and never opened
            for grader in grader_names(program_name(key, attempt), self.config.rollout.max_attempts):
                await self._hosts.release(grader)
            raise

    async def supervise(self) -> None:
        """Watch the engines, and tell the sandbox hosts that we live, until cancelled; engines join where
        `rollout.max_engines` and the cluster allow."""
        rollout = self.config.rollout
        async with task_group() as group:
            group.create_task(self._hosts.keep_alive(), name="keep sandboxes alive")
            group.create_task(self.fleet.supervise(rollout.max_engines or rollout.num_engines), name="engines")

    async def add_engine(self) -> str:
        """One more engine for the run under way; returns its name. Raises as `EngineFleet.add`."""
        return await self.fleet.add()

    async def remove_engine(self, name: str) -> None:
        """Let an engine leave the run under way; its programs go on elsewhere."""
        await self.fleet.remove(name, drain_s=self.config.rollout.drain_s)

    def expect(self, tasks: list[Task]) -> None:
        """The samples to come, in their order: the sandbox hosts pull and keep images by it."""
        self._hosts.expect([task.image for task in tasks])

    async def announce(self, task: Task, key: SampleKey) -> None:
        """The sample will run once there is a slot for it: the scheduler may have its sandbox prepared."""
        program = program_name(key, 0)
        spec = self._worker_config.episodes.spec(program, task, for_agent=True)
        await self.scheduler.announce(program, task_kind=task.kind, sandbox=spec)

    def sample_started(self, task: Task) -> None:
        self._hosts.sample_started(task.image)

    def sample_finished(self, task: Task) -> None:
        self._hosts.sample_finished(task.image)

    async def update_weights(self, source: WeightSource | Mapping[str, Any], *, version: str) -> UpdateReport:
        """Serve other weights from now on, without losing a request; `rollout.update_mode` says what becomes
        of turns in flight. A mapping is of torch tensors by their checkpoint names. Raises `WeightsRefused`, and
        the old ones serve on, as `runtime.weights.update_weights` does."""
        bucket_bytes = self.config.rollout.update_weights_bucket_megabytes * 2**20
        taken = await asyncio.to_thread(shared, source, bucket_bytes=bucket_bytes)
        return await self._weights.update(self.scheduler, taken, version=version)

    async def follow_weights(self) -> None:
        """Load what appears in `rollout.weights_folder`, until cancelled. A checkpoint that is refused is
        logged and passed over."""
        if self._weights_folder is None:
            return
        while True:
            await asyncio.sleep(WEIGHTS_POLL_S)
            newest = self._weights_folder.newest()
            if newest is None:
                continue
            try:
                await self.update_weights(newest[0], version=newest[1])
            except WeightsRefused as error:
                logger.warning("weights %s are not loaded: %s", newest[1], error)

    async def num_sandboxes(self) -> int:
        return await self._hosts.num_running()

    async def _start_sandboxes(self) -> None:
        self.sandbox_backend = await self._hosts.start(sorted({task.image for task in self._tasks}))
        logger.info("sandboxes: %s", self.sandbox_backend)
        bare = [task.instance_id for task in self._tasks if not task.self_contained]
        if bare and self.sandbox_backend == "local":
            raise ConfigError(
                f"sandbox.backend: {len(bare)} tasks ({bare[0]}, ...) need their Docker image, and no Docker engine "
                "is used; start Docker and set sandbox=docker"
            )

    async def _introduce(self, name: str, handle: Any) -> None:
        """Every worker knows an engine before the scheduler may name it; one that died is replaced by one
        that knows them all."""
        told = (worker.know(name, handle) for worker in self._workers.values())
        for error in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, WorkerDied):
                raise error

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
            grading=self.config.grading,
            keep_cut_output=rollout.update_mode is not UpdateMode.CUT,
            grading_attempts=rollout.max_attempts,
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
            engines=dict(self.fleet.handles),
            hosts=self._host_handles,
            folder=self.store.folder.resolve(),
            concurrency=self.config.rollout.concurrency,
        )


def start_ray(settings: RayConfig) -> None:
    """Join `ray.address`, or start a private cluster without dashboard or usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    private = settings.address is None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=settings.address or "local",
            num_cpus=settings.num_cpus if private else None,
            num_gpus=settings.num_gpus if private else None,
            include_dashboard=False if private else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"ray.address={settings.address!r}: no Ray cluster answers there; start one (see launch/) or leave it "
            "null for a private one"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts one of its own in its place
