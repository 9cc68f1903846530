"""Scripted programs: the same turns, token for token, whichever policy serves them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from thunder_rollout.bench.config import WorkloadConfig


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """`new_ids` go behind the context, `output_tokens` are generated, then `tool_s` passes."""

    new_ids: list[int]
    output_tokens: int
    tool_s: float


def programs(config: WorkloadConfig, *, seed: int, slot: int, vocab_size: int) -> Iterator[list[ScriptedTurn]]:
    """The endless sequence of programs that one slot of a closed loop plays.

    The first starts at a random age (its earlier turns folded into its prompt), so that the
    programs of a cell are spread over their lives from the beginning.
    """
    rng = random.Random(f"{config.name}/{seed}/{slot}")
    turns = _script(config, rng, vocab_size)
    age = rng.randrange(config.num_turns)
    if age:
        outputs = [rng.randrange(vocab_size) for turn in turns[:age] for _ in range(turn.output_tokens)]
        folded = [i for turn in turns[: age + 1] for i in turn.new_ids] + outputs
        turns = [ScriptedTurn(folded, turns[age].output_tokens, turns[age].tool_s), *turns[age + 1 :]]
    yield turns
    while True:
        yield _script(config, rng, vocab_size)


def mean_context_tokens(config: WorkloadConfig) -> float:
    """Mean over a program's turns of its context when the turn ends, in tokens."""
    growth = config.observation_tokens + config.output_tokens
    return config.prompt_tokens + config.output_tokens + growth * (config.num_turns - 1) / 2


def longest_context_tokens(config: WorkloadConfig) -> int:
    """A bound on any program's context: lengths are cut at twice their means."""
    return 2 * (config.prompt_tokens + (config.observation_tokens + config.output_tokens) * config.num_turns)


def _script(config: WorkloadConfig, rng: random.Random, vocab_size: int) -> list[ScriptedTurn]:
    turns = []
    for number in range(config.num_turns):
        new = _draw(rng, config.observation_tokens if number else config.prompt_tokens, config.spread)
        output = _draw(rng, config.output_tokens, config.spread)
        tool_s = _lognormal(rng, config.tool_s, config.spread)
        turns.append(ScriptedTurn([rng.randrange(vocab_size) for _ in range(new)], output, tool_s))
    return turns


def _draw(rng: random.Random, mean: int, spread: float) -> int:
    return max(1, min(2 * mean, round(_lognormal(rng, mean, spread))))


def _lognormal(rng: random.Random, mean: float, spread: float) -> float:
    return rng.lognormvariate(math.log(mean) - spread**2 / 2, spread) if mean > 0 else 0.0
