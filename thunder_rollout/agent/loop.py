"""The turn loop: reason, act, observe, until submitted or out of budget.

It sees Protocols alone (a model client, a sandbox) and tokens alone (see `chat`). Whatever the
agent does wrong becomes an observation; what the machinery does wrong is raised to the caller,
which retries the episode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from thunder_rollout.agent.actions import Malformed, format_observation, parse_action
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.trajectory import EndReason, Trajectory, TurnRecord, WeightSegment
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.sandbox.protocol import Sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnResult:
    """A generation, where it ran (last) and how long it waited for the scheduler. `weights`,
    `refill_tokens` and `engine_s` as in `TurnRecord`."""

    generation: Generation
    weights: list[WeightSegment]
    refill_tokens: int = 0
    backend: str
    queue_s: float
    engine_s: float


def in_one_piece(generation: Generation, *, backend: str, queue_s: float, engine_s: float) -> TurnResult:
    """The result of a turn that ran under one weight version."""
    segment = WeightSegment(version=generation.weight_version, num_tokens=len(generation.token_ids))
    return TurnResult(generation=generation, weights=[segment], backend=backend, queue_s=queue_s, engine_s=engine_s)


class Chat(Protocol):
    """A conversation as token ids; `ChatFormat` says what each means."""

    @property
    def end_id(self) -> int: ...

    def initial_ids(self, system: str, user: str) -> list[int]: ...

    def observation_ids(self, text: str, *, ended: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class ModelClient(Protocol):
    """One program's way to the engines, under whichever scheduler."""

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult: ...

    async def tool_started(self, tool: str) -> None: ...

    async def tool_ended(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLoop:
    """Runs one episode.

    `max_model_len` is the engine's; of `sampling`, `max_tokens` and `stop_token_ids` are set here.
    `on_turn` hears of every finished turn.
    """

    chat: Chat
    config: AgentConfig
    sampling: Sampling
    max_model_len: int
    on_turn: Callable[[TurnRecord], None] = lambda record: None

    async def run(self, prompt: str, model: ModelClient, sandbox: Sandbox) -> Trajectory:
        """Play one episode on `prompt`; raises only `InfrastructureFailure` and our own bugs."""
        trajectory = Trajectory(prompt_ids=self.chat.initial_ids(self.config.system_prompt, prompt))
        while len(trajectory.turns) < self.config.max_turns:
            budget = self._turn_budget(trajectory)
            if budget < 1:
                return self._end(trajectory, EndReason.MAX_TOKENS)
            if sum(turn.agent_s for turn in trajectory.turns) > self.config.max_episode_s:
                return self._end(trajectory, EndReason.MAX_TIME)
            sampling = replace(self.sampling, max_tokens=budget, stop_token_ids=(self.chat.end_id,))
            result = await model.turn(trajectory.context_ids, sampling)
            if await self._act(trajectory, result, model, sandbox):
                return self._end(trajectory, EndReason.SUBMITTED)
        return self._end(trajectory, EndReason.MAX_TURNS)

    async def _act(self, trajectory: Trajectory, result: TurnResult, model: ModelClient, sandbox: Sandbox) -> bool:
        """Carry out one generation; True when the agent submitted."""
        generation = result.generation
        record = _turn_record(trajectory, result)
        trajectory.add_generated(generation.token_ids, generation.logprobs)
        action = parse_action(self.chat.decode(generation.token_ids))
        if isinstance(action, Malformed):
            observation = action.observation
        elif action.submit:
            self._finish_turn(trajectory, replace(record, command=action.command))
            return True
        else:
            await model.tool_started("bash")
            executed = await sandbox.exec(action.command, timeout_s=self.config.exec_timeout_s)
            await model.tool_ended()
            observation = format_observation(executed)
            record = replace(
                record,
                tool_s=executed.took_s,
                command=action.command,
                exit_code=executed.exit_code,
            )
        self._finish_turn(trajectory, record)
        ended = bool(generation.token_ids) and generation.token_ids[-1] == self.chat.end_id
        trajectory.add_context(self.chat.observation_ids(observation, ended=ended))
        return False

    def _turn_budget(self, trajectory: Trajectory) -> int:
        limit = min(self.config.max_context_tokens, self.max_model_len)
        return min(self.config.max_turn_tokens, limit - trajectory.num_tokens)

    def _finish_turn(self, trajectory: Trajectory, record: TurnRecord) -> None:
        trajectory.turns.append(record)
        self.on_turn(record)

    def _end(self, trajectory: Trajectory, reason: EndReason) -> Trajectory:
        """Close the record; what follows the last generated id was never seen by a turn."""
        while trajectory.loss_mask and not trajectory.loss_mask[-1]:
            for column in (trajectory.response_ids, trajectory.loss_mask, trajectory.logprobs):
                column.pop()
        trajectory.end_reason = reason
        return trajectory


def _turn_record(trajectory: Trajectory, result: TurnResult) -> TurnRecord:
    generation = result.generation
    return TurnRecord(
        start=len(trajectory.response_ids),
        prompt_tokens=generation.prompt_tokens,
        cached_tokens=generation.cached_tokens,
        output_tokens=len(generation.token_ids),
        finish_reason=generation.finish_reason,
        backend=result.backend,
        weights=result.weights,
        refill_tokens=result.refill_tokens,
        queue_s=result.queue_s,
        engine_s=result.engine_s,
        prefill_s=generation.prefill_s,
        decode_s=generation.decode_s,
    )
