"""An episode as the row that verl trains on, and the row of an episode that the machinery kept from an end.

Ids, mask and log-probabilities are the trajectory's, one to one. `extra_fields.thunder` holds figures of the
episode under the names below `thunder/`; `extra_fields.reward_extra_info.acc` is 1 where the task is
resolved, so that verl's validation reports it as its core metric.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

from thunder_rollout.agent.trajectory import EndReason
from thunder_rollout.runtime.episode import Played
from thunder_rollout.verl_adapter.client import VerlModel

FAILURE = "failure"  # in extra_fields.thunder: the kind of failure of a row that is masked whole


def played_row(
    played: Played, model: VerlModel, *, mask_unfinished: bool, attempts: int, end_id: int
) -> AgentLoopOutput:
    """`num_turns` counts as verl does: the prompt, what the agent said and what it was answered."""
    trajectory = played.trajectory
    is_masked = mask_unfinished and trajectory.end_reason is not EndReason.SUBMITTED
    tool_s = sum(turn.tool_s for turn in trajectory.turns) + played.sandbox_wait_s
    # A prompt that leaves no room for a turn: verl's rows have at least one token of response.
    response_ids, mask, logprobs = trajectory.response_ids or [end_id], trajectory.loss_mask or [0], trajectory.logprobs
    return AgentLoopOutput(
        prompt_ids=trajectory.prompt_ids,
        response_ids=response_ids,
        response_mask=[0] * len(mask) if is_masked else mask,
        response_logprobs=(logprobs or [0.0]) if model.has_logprobs else None,
        reward_score=played.verdict.reward,
        num_turns=max(1, 2 * len(trajectory.turns)),
        metrics=AgentLoopMetrics(
            generate_sequences=sum(turn.queue_s + turn.engine_s for turn in trajectory.turns),
            tool_calls=tool_s,
            compute_score=played.grade_s,
            num_preempted=model.num_preempted,
        ),
        extra_fields=_extra_fields(model, resolved=played.verdict.resolved)
        | {"thunder": _figures(played) | {"masked": float(is_masked), "attempts": float(attempts)}},
    )


def failed_row(prompt_ids: list[int], end_id: int, kind: str, *, has_logprobs: bool) -> AgentLoopOutput:
    """One token of response that counts for nothing, for trainers that can't do without a row."""
    return AgentLoopOutput(
        prompt_ids=prompt_ids,
        response_ids=[end_id],
        response_mask=[0],
        response_logprobs=[0.0] if has_logprobs else None,
        reward_score=0.0,
        num_turns=1,
        metrics=AgentLoopMetrics(),
        extra_fields=_extra_fields(None, resolved=False) | {"thunder": {FAILURE: kind}},
    )


def _extra_fields(model: VerlModel | None, *, resolved: bool) -> dict[str, Any]:
    versions = model.versions if model else None
    return {
        "turn_scores": [],
        "tool_rewards": [],
        "min_global_steps": versions.first if versions else None,
        "max_global_steps": versions.last if versions else None,
        "reward_extra_info": {"acc": float(resolved)},
    }


def _figures(played: Played) -> dict[str, float]:
    turns = played.trajectory.turns
    return {
        "turns": float(len(turns)),
        "prompt_tokens": float(sum(turn.prompt_tokens for turn in turns)),
        "cached_tokens": float(sum(turn.cached_tokens for turn in turns)),
        "output_tokens": float(sum(turn.output_tokens for turn in turns)),
        "held_s": sum(turn.queue_s for turn in turns),
        "engine_s": sum(turn.engine_s for turn in turns),
        "tool_s": sum(turn.tool_s for turn in turns),
        "sandbox_wait_s": played.sandbox_wait_s,
        "grade_s": played.grade_s,
        f"end/{played.trajectory.end_reason}": 1.0,
    }
