"""`thunder_swe`: our turn loop as an agent loop of verl.

A row's task (see `tasks.verl_rows`) is played in a sandbox of the job's hosts and graded in a fresh one; the
reward is set, so verl computes none. Where the machinery fails, the episode is played anew, up to
`max_attempts` times. Then the failure is raised, which verl's V1 trainers keep out of the group's statistics:
the other samples of the prompt are trained on (sync), or the group is evicted and another prompt generated
(async; sync where nothing is left of a group and `trainer.v1.sampler.sync_refill_failed_groups` is set).
The V0 trainer would end its step, so there the row is masked whole and marked (see `output.failed_row`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

from thunder_rollout.agent.loop import AgentLoop
from thunder_rollout.engine.protocol import Sampling
from thunder_rollout.errors import GradingFailed, InfrastructureFailure, Stale
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.verl_rows import VALIDATION, task_of_verl_row
from thunder_rollout.verl_adapter.chat import ContinuousChat
from thunder_rollout.verl_adapter.client import VerlModel
from thunder_rollout.verl_adapter.crew import Crew, SandboxHosts, lost_its_sandbox, make_crew
from thunder_rollout.verl_adapter.output import failed_row, played_row
from thunder_rollout.verl_adapter.router.programs import VALIDATION_PREFIX
from thunder_rollout.verl_adapter.settings import read_settings
from thunder_rollout.verl_adapter.staleness import stale_from

logger = logging.getLogger(__name__)


class SweAgentLoop(AgentLoopBase):
    """One episode. `settings` are those of `SweSettings`; `crew` is of this process unless given."""

    def __init__(self, *args: Any, settings: Any = None, crew: Crew | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._crew = crew or _crew(self.server_manager, self.tokenizer, _Raw(settings))

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """`row` holds the columns. Raises `UserError` for a row or set-up that can't be used, and under V1
        `InfrastructureFailure` when every attempt failed."""
        crew, extra_info = self._crew, row.get("extra_info")
        task = task_of_verl_row(extra_info)
        name = (VALIDATION_PREFIX if (extra_info or {}).get("split") == VALIDATION else "") + task.instance_id
        messages = [message | {"content": crew.chat.escape(message["content"])} for message in row["raw_prompt"]]
        prompt_ids = await self.ct_build_initial_tokens(messages)
        stale = stale_from(self.config.trainer, row.get("global_steps"))
        crew.stages.sample_started(task)
        try:
            return await self._play_until_it_ends(task, name, self._loop(prompt_ids), sampling_params, stale)
        except InfrastructureFailure as failure:
            if self.config.transfer_queue.enable:
                raise
            has_logprobs = bool(self.rollout_config.calculate_log_probs)
            return failed_row(prompt_ids, crew.chat.end_id, failure.kind, has_logprobs=has_logprobs)
        finally:
            crew.stages.sample_finished(task)

    async def _play_until_it_ends(
        self, task: Task, name: str, loop: AgentLoop, sampling_params: dict[str, Any], stale: int | None
    ) -> AgentLoopOutput:
        for attempts in itertools.count(1):
            model = VerlModel(
                client=self._crew.client,
                program=f"{name}#{uuid.uuid4().hex[:12]}",
                sampling_params=sampling_params,
                stale_from=stale,
            )
            try:
                return await self._play(task, loop, model, attempts=attempts)
            except InfrastructureFailure as failure:
                logger.warning("program=%s attempt=%d: %s", model.program, attempts, failure)
                self._crew.stages.failed(failure)
                if _is_in_vain(failure):
                    raise
                await asyncio.sleep(self._crew.retry_pause_s)
                if attempts >= self._crew.settings.max_attempts:
                    raise
        raise AssertionError("unreachable")

    async def _play(self, task: Task, loop: AgentLoop, model: VerlModel, *, attempts: int) -> AgentLoopOutput:
        stage = await self._crew.stages.stage(task)
        played = await stage.player.play(
            model.program, task, loop, lambda spec: _with_sandbox(stage.hosts, model, spec)
        )
        return played_row(
            played,
            model,
            mask_unfinished=self._crew.settings.mask_unfinished,
            attempts=attempts,
            end_id=self._crew.chat.end_id,
        )

    def _loop(self, prompt_ids: list[int]) -> AgentLoop:
        rollout, agent = self.rollout_config, self._crew.settings.agent
        row_tokens = len(prompt_ids) + rollout.response_length
        return AgentLoop(
            chat=ContinuousChat(self._crew.chat, self.continuous_token_builder, prompt_ids),
            config=replace(agent, max_context_tokens=min(agent.max_context_tokens, row_tokens)),
            sampling=Sampling(max_tokens=1),
            max_model_len=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        )


@contextlib.asynccontextmanager
async def _with_sandbox(hosts: SandboxHosts, model: VerlModel, spec: SandboxSpec) -> AsyncIterator[VerlModel]:
    """The program's sandbox starts beside its first turn, when that is granted: a program that is held has none."""
    starting: list[asyncio.Task[float]] = []

    def granted() -> None:
        if not starting:
            starting.append(asyncio.create_task(hosts.prepare(model.program, spec), name="prepare-sandbox"))

    model.on_granted = granted
    try:
        yield model
    finally:
        model.client.program_ended(model.program)
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)  # who used the sandbox has heard
        await asyncio.shield(hosts.release(model.program))


def _is_in_vain(failure: InfrastructureFailure) -> bool:
    """Whether another attempt would fail as well. Grading was tried again already, but on the same hosts."""
    return isinstance(failure, Stale) or (isinstance(failure, GradingFailed) and not lost_its_sandbox(failure))


class _Raw:
    """The settings as hydra hands them over: for one process always the same."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Raw) and other.settings == self.settings


@functools.lru_cache(maxsize=8)
def _crew(client: Any, tokenizer: Any, raw: _Raw) -> Crew:
    return make_crew(read_settings(raw.settings), client, tokenizer)
