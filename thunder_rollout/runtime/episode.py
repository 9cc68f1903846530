"""One episode from its task to its verdict: the agent at work, its diff, the tests in a fresh sandbox.

The grading sandbox starts beside the agent's last turns: one turn before half of the earlier episodes
were over, and at the latest when one turn is left or the agent submits. KV and sandbox are given up before
grading. An infrastructure failure leaves nothing behind and is raised to the caller, who decides whether to
try again.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from thunder_rollout.agent.loop import AgentLoop, ModelClient
from thunder_rollout.agent.trajectory import Trajectory, TurnRecord
from thunder_rollout.errors import GradingFailed, UndiffableChanges
from thunder_rollout.runtime.lazy_sandbox import LazySandbox
from thunder_rollout.sandbox.protocol import Sandbox, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import Grade, GradingConfig, grade
from thunder_rollout.tasks.task import Task

_REMEMBERED_EPISODES = 64
_MIN_EPISODES = 4  # fewer say nothing of how long an episode is

OpenModel = Callable[[SandboxSpec], AbstractAsyncContextManager[ModelClient]]


class SandboxSource(Protocol):
    """Where sandboxes come from: the hosts of a run's nodes."""

    def sandbox(self, program: str, spec: SandboxSpec) -> Sandbox:
        """The program's own sandbox, prepared ahead if the scheduler said so; `start` waits for
        it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """What every episode of a run has in common."""

    run: str
    limits: SandboxLimits
    grading: GradingConfig = field(default_factory=GradingConfig)
    grading_attempts: int = 1  # a finished episode is not thrown away for one grader's failure

    def spec(self, program: str, task: Task, *, for_agent: bool = False) -> SandboxSpec:
        """Of the sandbox in which the task is worked on, or of the grader's, which keeps a longer output: the log."""
        labels = {"run": self.run, "program": program, "task": task.instance_id}
        limits = self.limits if for_agent else replace(self.limits, output_bytes=self.grading.log_bytes)
        return sandbox_spec(task, for_agent=for_agent, limits=limits, labels=labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """`sandbox_wait_s` is how long the agent stood waiting for its sandbox."""

    trajectory: Trajectory
    patch: bytes
    verdict: Grade
    sandbox_wait_s: float
    grade_s: float


def grader_names(program: str, attempts: int) -> list[str]:
    """The sandboxes in which a program is graded, one an attempt."""
    return [f"{program}/grade{i}" for i in range(attempts)]


class EpisodePlayer:
    """Plays many episodes at a time on one event loop."""

    def __init__(self, settings: EpisodeSettings, sandboxes: SandboxSource) -> None:
        self._settings = settings
        self._sandboxes = sandboxes
        self.turns_of_episodes: deque[int] = deque(maxlen=_REMEMBERED_EPISODES)

    async def play(self, program: str, task: Task, loop: AgentLoop, open_model: OpenModel) -> Played:
        """Leaving `open_model`'s context gives up the program's KV and sandbox. Raises
        `InfrastructureFailure`."""
        grader = LazySandbox(self._grader(grader_names(program, 1)[0], task))
        try:
            trajectory, patch, wait_s = await self._act(program, task, loop, open_model, grader)
            grade_started = time.monotonic()
            if isinstance(patch, UndiffableChanges):
                patch, verdict = b"", Grade(resolved=False, reward=0.0, reason=str(patch))
            else:
                verdict = await self._grade(program, task, patch, grader)
        finally:
            await grader.stop()
        return Played(
            trajectory=trajectory,
            patch=patch,
            verdict=verdict,
            sandbox_wait_s=wait_s,
            grade_s=time.monotonic() - grade_started,
        )

    async def _act(
        self, program: str, task: Task, loop: AgentLoop, open_model: OpenModel, grader: LazySandbox
    ) -> tuple[Trajectory, bytes | UndiffableChanges, float]:
        spec = self._settings.spec(program, task, for_agent=True)
        sandbox = LazySandbox(self._sandboxes.sandbox(program, spec))
        turns: list[TurnRecord] = []

        def turn_ended(turn: TurnRecord) -> None:
            turns.append(turn)
            # Not before its own has its place: where a node takes no more, the grader's could be what it waits for.
            if sandbox.started and len(turns) >= self._likely_turns(loop.config.max_turns) - 1:
                grader.begin()

        async with open_model(spec) as model:
            trajectory = await replace(loop, on_turn=turn_ended).run(task.problem_statement, model, sandbox)
            self.turns_of_episodes.append(len(turns))
            if sandbox.started:
                grader.begin()
            # From what the agent was given: an image's own commit may lie on top of base_commit.
            patch = await _changes(sandbox)
        return trajectory, patch, sandbox.wait_s

    def _likely_turns(self, max_turns: int) -> int:
        if len(self.turns_of_episodes) < _MIN_EPISODES:
            return max_turns
        return min(max_turns, statistics.median_low(self.turns_of_episodes))

    async def _grade(self, program: str, task: Task, patch: bytes, early: LazySandbox) -> Grade:
        """Raises `GradingFailed` when every attempt failed."""
        *first, last = grader_names(program, self._settings.grading_attempts)
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
            config=self._settings.grading,
        )

    def _grader(self, name: str, task: Task) -> Sandbox:
        return self._sandboxes.sandbox(name, self._settings.spec(name, task))


async def _changes(sandbox: LazySandbox) -> bytes | UndiffableChanges:
    try:
        return await sandbox.diff("HEAD") if sandbox.started else b""
    except UndiffableChanges as error:
        return error
