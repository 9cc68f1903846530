"""A rollout worker: runs whole samples, many at a time on one event loop.

One sample: open the program, play the episode, take the diff, give up KV and sandbox, grade in a
fresh sandbox, put the trajectory on disk. The grading sandbox starts beside the agent's last turns:
one turn before half of the earlier episodes were over, and at the latest when one turn is left or the
agent submits. An infrastructure failure leaves nothing behind and is raised to the driver, which
decides whether to try again.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.loop import AgentLoop
from thunder_rollout.agent.trajectory import Trajectory, TurnRecord
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.errors import GradingFailed
from thunder_rollout.runtime.client import ProgramClient, SchedulerPort
from thunder_rollout.runtime.lazy_sandbox import LazySandbox
from thunder_rollout.runtime.store import FinishedSample, RunStore, SampleKey
from thunder_rollout.sandbox.protocol import Sandbox, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import Grade, GradingConfig, grade
from thunder_rollout.tasks.task import Task

_REMEMBERED_EPISODES = 64
_MIN_EPISODES = 4  # fewer say nothing of how long an episode is


class SandboxSource(Protocol):
    """Where a worker gets sandboxes: the host of its node."""

    def sandbox(self, program: str, spec: SandboxSpec) -> Sandbox:
        """The program's own sandbox, prepared ahead if the scheduler said so; `start` waits for
        it."""


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
    grading_attempts: int = 1  # a finished episode is not thrown away for one grader's failure
    block_size: int | None = None  # set: block hashes go with every request
    keep_cut_output: bool = True  # of turns that are cut for new weights


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


def grader_names(program: str, attempts: int) -> list[str]:
    """The sandboxes in which a program is graded, one an attempt."""
    return [f"{program}/grade{i}" for i in range(attempts)]


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
        self._sandboxes = sandboxes
        self._store = store
        self._turns_of_episodes: deque[int] = deque(maxlen=_REMEMBERED_EPISODES)

    async def run(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        """Run one sample to its parquet file. Raises `InfrastructureFailure`."""
        started_at = time.time()
        program = program_name(key, attempt)
        grader = LazySandbox(self._grader(grader_names(program, 1)[0], task))
        try:
            trajectory, patch, wait_s = await self._episode(program, task, grader)
            grade_started = time.monotonic()
            verdict = await self._grade(program, task, patch, grader)
        finally:
            await grader.stop()
        sample = FinishedSample(
            key=key,
            attempt=attempt,
            repo=task.repo,
            kind=task.kind,
            trajectory=trajectory,
            reward=verdict.reward,
            resolved=verdict.resolved,
            grade_reason=verdict.reason,
            grade_log=verdict.log,
            patch=patch,
            model=self._config.model,
            temperature=self._config.sampling.temperature,
            sandbox_backend=self._config.sandbox_backend,
            sandbox_wait_s=wait_s,
            grade_s=time.monotonic() - grade_started,
            started_at=started_at,
            finished_at=time.time(),
        )
        self._store.write(sample)
        return _outcome(sample, verdict)

    async def _episode(self, program: str, task: Task, grader: LazySandbox) -> tuple[Trajectory, bytes, float]:
        spec = self._spec(program, task, for_agent=True)
        sandbox = LazySandbox(self._sandboxes.sandbox(program, spec))
        turns: list[TurnRecord] = []

        def turn_ended(turn: TurnRecord) -> None:
            turns.append(turn)
            if len(turns) >= self._likely_turns() - 1:
                grader.begin()

        loop = AgentLoop(
            chat=self._chat,
            config=self._config.agent,
            sampling=self._config.sampling,
            max_model_len=self._config.max_model_len,
            on_turn=turn_ended,
        )
        client = ProgramClient(
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
        async with client:
            trajectory = await loop.run(task.problem_statement, client, sandbox)
            self._turns_of_episodes.append(len(turns))
            if sandbox.started:
                grader.begin()
            # From what the agent was given: an image's own commit may lie on top of base_commit.
            patch = await sandbox.diff("HEAD") if sandbox.started else b""
        return trajectory, patch, sandbox.wait_s

    def _likely_turns(self) -> int:
        if len(self._turns_of_episodes) < _MIN_EPISODES:
            return self._config.agent.max_turns
        return min(self._config.agent.max_turns, statistics.median_low(self._turns_of_episodes))

    async def _grade(self, program: str, task: Task, patch: bytes, early: LazySandbox) -> Grade:
        """Raises `GradingFailed` when every attempt failed."""
        *first, last = grader_names(program, self._config.grading_attempts)
        sandboxes: list[Sandbox] = [early]
        for grader in first:
            with contextlib.suppress(GradingFailed):
                return await self._grade_in(grader, task, patch, sandboxes)
        return await self._grade_in(last, task, patch, sandboxes)

    async def _grade_in(self, grader: str, task: Task, patch: bytes, ready: list[Sandbox]) -> Grade:
        """`ready` are sandboxes to use first."""
        return await grade(
            task,
            patch,
            lambda: started(ready.pop() if ready else self._grader(grader, task)),
            config=self._config.grading,
        )

    def _grader(self, name: str, task: Task) -> Sandbox:
        return self._sandboxes.sandbox(name, self._spec(name, task))

    def _spec(self, program: str, task: Task, *, for_agent: bool = False) -> SandboxSpec:
        labels = {"run": self._config.run, "program": program, "task": task.instance_id}
        return sandbox_spec(task, for_agent=for_agent, limits=self._config.limits, labels=labels)


def _outcome(sample: FinishedSample, verdict: Grade) -> SampleOutcome:
    return SampleOutcome(
        key=sample.key,
        resolved=verdict.resolved,
        reward=verdict.reward,
        num_turns=len(sample.trajectory.turns),
        end_reason=str(sample.trajectory.end_reason),
        wall_s=sample.finished_at - sample.started_at,
    )
