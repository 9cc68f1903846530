"""Demonstrators' transcripts as token ids in the agent's own format, with the loss mask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thunder_rollout.agent.actions import format_observation
from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import SYSTEM_PROMPT
from thunder_rollout.sandbox.protocol import ExecResult
from thunder_rollout.tasks.toy.expert import ExpertTurn, expert_turns, hasty_turns
from thunder_rollout.tasks.toy.generator import problem_stream
from thunder_rollout.tasks.toy.problem import ToyProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    problem: ToyProblem
    turns: list[ExpertTurn]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedTranscript:
    """`ids` (N,) and `learn` (N,): which of them the demonstrator wrote and is to be imitated in."""

    ids: NDArray[np.int64]
    learn: NDArray[np.bool_]


def transcripts(
    seed: str, difficulty: str, count: int, *, mistake_share: float = 0.0, hasty_share: float = 0.0
) -> Iterator[Transcript]:
    problems = islice(problem_stream(seed, difficulty), count)
    for index, problem in enumerate(problems):
        rng = random.Random(f"{seed}:expert:{index}")
        is_hasty = random.Random(f"{seed}:demonstrator:{index}").random() < hasty_share  # the expert's stay the same
        turns = hasty_turns(problem, rng) if is_hasty else expert_turns(problem, rng, mistake_share)
        yield Transcript(problem=problem, turns=turns)


def transcript_texts(transcript: Transcript) -> Iterator[str]:
    """Everything a tokenizer must be good at, in pieces."""
    yield f"system\n{SYSTEM_PROMPT}\nuser\nassistant\n"
    yield transcript.problem.statement
    for turn in transcript.turns:
        yield turn.text
        yield observation(turn)


def tokenise(transcript: Transcript, chat: ChatFormat, tokenizer: Any) -> TokenisedTranscript:
    """The ids the agent loop would have made, had the engine produced the demonstrator's turns."""
    ids = chat.initial_ids(SYSTEM_PROMPT, transcript.problem.statement)
    learn = [False] * len(ids)
    for index, turn in enumerate(transcript.turns):
        if index:
            context = chat.observation_ids(observation(transcript.turns[index - 1]), ended=True)
            ids += context
            learn += [False] * len(context)
        written = [*tokenizer.encode(turn.text, add_special_tokens=False), chat.end_id]
        ids += written
        learn += [turn.imitate] * len(written)
    return TokenisedTranscript(ids=np.array(ids), learn=np.array(learn))


def observation(turn: ExpertTurn) -> str:
    return format_observation(ExecResult(exit_code=0, output=turn.output, timed_out=False, took_s=0.0))
