"""The record of one episode, exact enough to train on.

Invariants: `response_ids`, `loss_mask` and `logprobs` have one length; the mask is 1 exactly on
generated ids; a masked-out position has log-probability 0.0; turn i's prompt is
`prompt_ids + response_ids[:start]` of that turn, so each prompt is the previous turn's tokens
plus the observation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class EndReason(StrEnum):
    SUBMITTED = "submitted"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    MAX_TIME = "max_time"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSegment:
    """So many generated tokens in a row that the weights `version` produced."""

    version: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One reasoning + acting period. `start` is its first generated id's place in
    `response_ids`; times are seconds: `queue_s` waiting for the scheduler, `engine_s` from there to
    the result (the engine's own queue, new weights and engines that died included), `prefill_s` and `decode_s`
    at work on what came of it, `tool_s` in the command. `weights` are its generated tokens from first to
    last: more than one segment where the turn went on under new weights. Such a turn has the prompt and
    cached tokens of its beginning; `refill_tokens` were computed again after that."""

    start: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    backend: str
    weights: list[WeightSegment]
    refill_tokens: int
    queue_s: float
    engine_s: float
    prefill_s: float
    decode_s: float
    tool_s: float = 0.0
    command: str = ""
    exit_code: int | None = None

    @property
    def agent_s(self) -> float:
        """What the agent itself took: none of the machinery's queues and failures."""
        return self.prefill_s + self.decode_s + self.tool_s


@dataclass(slots=True, kw_only=True)
class Trajectory:
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    end_reason: EndReason = EndReason.MAX_TURNS

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def context_ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    def add_generated(self, token_ids: list[int], logprobs: list[float]) -> None:
        if len(token_ids) != len(logprobs):
            raise ValueError(f"{len(token_ids)} ids with {len(logprobs)} log-probabilities")
        self.response_ids += token_ids
        self.loss_mask += [1] * len(token_ids)
        self.logprobs += logprobs

    def add_context(self, token_ids: list[int]) -> None:
        self.response_ids += token_ids
        self.loss_mask += [0] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
