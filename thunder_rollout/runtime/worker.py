"""A rollout worker: runs whole samples, many at a time on one event loop.

One sample: play the episode and have it graded (see `episode`), put the trajectory on disk. An
infrastructure failure leaves nothing behind and is raised to the driver, which decides whether to try
again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.loop import AgentLoop
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.runtime.client import ProgramClient, SchedulerPort
from thunder_rollout.runtime.episode import EpisodePlayer, EpisodeSettings, SandboxSource
from thunder_rollout.runtime.store import FinishedSample, RunStore, SampleKey
from thunder_rollout.sandbox.protocol import SandboxLimits, SandboxSpec
from thunder_rollout.tasks.grading import Grade, GradingConfig
from thunder_rollout.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What every sample of a run has in common; travels to the workers once."""

    run: str
    model: str
    agent: AgentConfig
    sampling: Sampling
    max_model_len: int
    limits: SandboxLimits
    sandbox_backend: str
    grading: GradingConfig = field(default_factory=GradingConfig)
    grading_attempts: int = 1  # see `EpisodeSettings`
    block_size: int | None = None  # set: block hashes go with every request
    keep_cut_output: bool = True  # of turns that are cut for new weights

    @property
    def episodes(self) -> EpisodeSettings:
        return EpisodeSettings(
            run=self.run, limits=self.limits, grading=self.grading, grading_attempts=self.grading_attempts
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutcome:
    """What the driver needs to know of a finished sample; the rest is on disk."""

    key: SampleKey
    resolved: bool
    reward: float
    num_turns: int
    end_reason: str
    wall_s: float


def program_name(key: SampleKey, attempt: int) -> str:
    return f"{key.instance_id}#{key.sample}.{attempt}"


class RolloutWorker:
    """Plain asyncio; `runtime.worker_actor` puts it on Ray."""

    def __init__(
        self,
        name: str,
        config: WorkerConfig,
        chat: ChatFormat,
        scheduler: SchedulerPort,
        engines: Mapping[str, Engine],
        sandboxes: SandboxSource,
        store: RunStore,
    ) -> None:
        self._name = name
        self._config = config
        self._chat = chat
        self._scheduler = scheduler
        self._engines = engines
        self._store = store
        self._player = EpisodePlayer(config.episodes, sandboxes)

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        """Run one sample to its parquet file. Raises `InfrastructureFailure`."""
        started_at = time.time()
        program = program_name(key, attempt)
        loop = AgentLoop(
            chat=self._chat,
            config=self._config.agent,
            sampling=self._config.sampling,
            max_model_len=self._config.max_model_len,
        )
        played = await self._player.play(program, task, loop, lambda spec: self._client(program, task, spec))
        sample = FinishedSample(
            key=key,
            attempt=attempt,
            repo=task.repo,
            kind=task.kind,
            trajectory=played.trajectory,
            reward=played.verdict.reward,
            resolved=played.verdict.resolved,
            grade_reason=played.verdict.reason,
            grade_log=played.verdict.log,
            patch=played.patch,
            model=self._config.model,
            temperature=self._config.sampling.temperature,
            sandbox_backend=self._config.sandbox_backend,
            sandbox_wait_s=played.sandbox_wait_s,
            grade_s=played.grade_s,
            started_at=started_at,
            finished_at=time.time(),
        )
        self._store.write(sample)
        return _outcome(sample, played.verdict)

    def _client(self, program: str, task: Task, spec: SandboxSpec) -> ProgramClient:
        return ProgramClient(
            program,
            self._scheduler,
            self._engines,
            group=task.instance_id,
            task_kind=task.kind,
            owner=self._name,
            sandbox=spec,
            block_size=self._config.block_size,
            keep_cut_output=self._config.keep_cut_output,
        )


def _outcome(sample: FinishedSample, verdict: Grade) -> SampleOutcome:
    return SampleOutcome(
        key=sample.key,
        resolved=verdict.resolved,
        reward=verdict.reward,
        num_turns=len(sample.trajectory.turns),
        end_reason=str(sample.trajectory.end_reason),
        wall_s=sample.finished_at - sample.started_at,
    )
