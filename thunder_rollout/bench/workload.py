"""Scripted programs: the same turns, token for token, whichever policy serves them.

The i-th program to start is the same under every policy; a slot of the closed loop takes the next one when its
program ends, so that the samples of a group start one after the other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thunder_rollout.bench.config import WorkloadConfig


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """`new_ids` go behind the context, `output_tokens` are generated, then `tool` runs for `tool_s`."""

    new_ids: list[int]
    output_tokens: int
    tool_s: float
    tool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is left of a program: `context_ids` are what its turns that are over have left behind."""

    index: int
    num_turns_over: int
    turns: Sequence[ScriptedTurn]
    context_ids: list[int]
    group: str | None

    def after(self, num_turns: int, rng: random.Random, vocab_size: int) -> Script:
        """The same program with its first turns over; what was generated in them is random. One turn is left
        at least, for scripts differ in length."""
        over = self.turns[: min(num_turns, len(self.turns) - 1)]
        context: list[int] = []
        for turn in over:
            context += turn.new_ids
            context += (rng.randrange(vocab_size) for _ in range(turn.output_tokens))
        return replace(self, num_turns_over=len(over), turns=self.turns[len(over) :], context_ids=context)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a slot of the closed loop is: in its `index`-th program, so many turns over."""

    index: int
    num_turns_over: int


def random_positions(config: WorkloadConfig, *, seed: int, num_slots: int) -> list[Position]:
    """The first programs, each at a random age, so that they are spread over their lives."""
    rng = random.Random(f"{config.name}/{seed}/ages")
    return [Position(index, rng.randrange(config.num_turns)) for index in range(num_slots)]


def script(config: WorkloadConfig, position: Position, *, seed: int, vocab_size: int) -> Script:
    """The program at `position`; equal arguments give equal tokens."""
    rng = random.Random(f"{config.name}/{seed}/{position.index}")
    group = position.index // config.group_size
    low, high = config.size_range
    size = low * (high / low) ** _even_share(position.index, random.Random(f"{config.name}/{seed}/sizes"))
    first = random.Random(f"{config.name}/{seed}/group {group}") if config.group_size > 1 else rng
    turns: list[ScriptedTurn] = []
    num_context = 0
    for number in range(config.num_turns):
        source, mean = (rng, config.observation_tokens) if number else (first, config.prompt_tokens)
        num_new = _length(source, size * mean, config.spread)
        output_tokens = _length(rng, config.output_tokens, config.spread)
        num_context += num_new + output_tokens
        if turns and num_context > config.max_context_tokens:
            break
        tool = rng.choices(config.tools, [tool.share for tool in config.tools])[0]
        new_ids = source.choices(range(vocab_size), k=num_new)
        turns.append(ScriptedTurn(new_ids, output_tokens, _lognormal(rng, tool.mean_s, tool.spread), tool.name))
    whole = Script(
        index=position.index,
        num_turns_over=0,
        turns=turns,
        context_ids=[],
        group=f"group {group}" if config.group_size > 1 else None,
    )
    return whole.after(position.num_turns_over, rng, vocab_size) if position.num_turns_over else whole


def mean_context_tokens(config: WorkloadConfig) -> float:
    """Mean over a program's turns of its context when the turn ends, in tokens (before any cut)."""
    low, high = config.size_range
    size = (high - low) / math.log(high / low) if high > low else low
    turns_before = (config.num_turns - 1) / 2
    read_tokens = config.prompt_tokens + config.observation_tokens * turns_before
    return size * read_tokens + config.output_tokens * (turns_before + 1)


def longest_context_tokens(config: WorkloadConfig) -> int:
    """A bound on any program's context: lengths are cut at twice their means."""
    high = config.size_range[1]
    read_tokens = config.prompt_tokens + config.observation_tokens * (config.num_turns - 1)
    first = 2 * (high * config.prompt_tokens + config.output_tokens)
    whole = 2 * (high * read_tokens + config.output_tokens * config.num_turns)
    return math.ceil(min(whole, max(first, config.max_context_tokens)))


def _even_share(index: int, rng: random.Random) -> float:
    """In [0, 1), spread evenly over any few programs that follow each other (van der Corput, shifted at random):
    else a window's throughput would say what sizes came up in it."""
    mirrored = int(f"{index:064b}"[::-1], 2) / 2**64
    return (mirrored + rng.random()) % 1.0


def _length(rng: random.Random, mean: float, spread: float) -> int:
    return max(1, min(round(2 * mean), round(_lognormal(rng, mean, spread))))


def _lognormal(rng: random.Random, mean: float, spread: float) -> float:
    return rng.lognormvariate(math.log(mean) - spread**2 / 2, spread) if mean > 0 else 0.0
