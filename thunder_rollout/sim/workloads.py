"""What simulated programs do: seeded generators in the shape of published traffic.

A workload gives its i-th program, the same for every policy. Where a source publishes a number it
stands in the docstring beside its name; the rest, marked "ours", is chosen to be plausible and to
keep the published ratios. Lengths and times are lognormal (mean, sigma), cut at four times the
mean where nothing else is said; turns are counted from the first model call to the last.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from thunder_rollout.bench import workload as live
from thunder_rollout.bench.config import WorkloadConfig
from thunder_rollout.errors import ConfigError

SAMPLE_PROGRAMS = 400  # whose mean stands for the workload's where no formula does


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """`new_tokens` go behind the context, `output_tokens` are generated, then `tool` takes `tool_s`."""

    new_tokens: int
    output_tokens: int
    tool_s: float
    tool: str = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One program. `shared` are (key, tokens) at the head of its first turn's tokens that every
    program with that key has in common."""

    turns: tuple[ScriptedTurn, ...]
    shared: tuple[tuple[str, int], ...] = ()
    group: str | None = None
    task_kind: str | None = None

    @property
    def longest_context_tokens(self) -> int:
        return sum(turn.new_tokens + turn.output_tokens for turn in self.turns)

    def first(self, num_turns: int) -> Script:
        """Its first `num_turns` turns alone."""
        return replace(self, turns=self.turns[:num_turns])

    def aged(self, num_turns: int) -> Script:
        """The same program with its first `num_turns` turns over, folded into its first prompt."""
        if not num_turns:
            return self
        over, first = self.turns[:num_turns], self.turns[num_turns]
        folded = sum(turn.new_tokens + turn.output_tokens for turn in over) + first.new_tokens
        turns = (ScriptedTurn(folded, first.output_tokens, first.tool_s, first.tool), *self.turns[num_turns + 1 :])
        return replace(self, turns=turns)


class Workload(Protocol):
    @property
    def name(self) -> str: ...

    def script(self, index: int, seed: int) -> Script:
        """The `index`-th program to start; equal arguments give equal scripts."""

    def mean_context_tokens(self) -> float:
        """Mean over a program's turns of its context when the turn ends."""


@dataclass(frozen=True, slots=True)
class Law:
    """Lognormal with this mean and sigma, between `least` and `most` (default: 4 x mean)."""

    mean: float
    sigma: float = 0.5
    least: float = 0.0
    most: float | None = None

    def draw(self, rng: random.Random) -> float:
        if self.mean <= 0:
            return 0.0
        value = rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return max(self.least, min(4 * self.mean if self.most is None else self.most, value))

    def count(self, rng: random.Random) -> int:
        return max(1, round(self.draw(rng)))


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    share: float  # of the calls
    seconds: Law


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A workload of independent draws. `system_tokens` head every prompt; with `group_size` the
    whole first prompt is common to the programs of a group, which start one after the other."""

    name: str
    turns: Law
    prompt_tokens: Law
    observation_tokens: Law
    output_tokens: Law
    tools: tuple[Tool, ...]
    system_tokens: int = 0
    group_size: int = 1
    stated_context_tokens: float | None = None  # the mean context, where a formula gives it

    def script(self, index: int, seed: int) -> Script:
        group = index // self.group_size
        prompt = self.system_tokens + self.prompt_tokens.count(random.Random(f"{self.name}/{seed}/group {group}"))
        rng = random.Random(f"{self.name}/{seed}/{index}")
        turns = tuple(
            self._turn(rng, prompt if number == 0 else self.observation_tokens.count(rng))
            for number in range(self.turns.count(rng))
        )
        shared = [("system", self.system_tokens)] if self.system_tokens else []
        if self.group_size > 1:
            shared.append((f"group {group}", prompt - self.system_tokens))
        return Script(
            turns=turns,
            shared=tuple(shared),
            group=f"g{group}" if self.group_size > 1 else None,
            task_kind=self.name,
        )

    def mean_context_tokens(self) -> float:
        if self.stated_context_tokens is not None:
            return self.stated_context_tokens
        return mean_context_tokens([self.script(index, 0) for index in range(SAMPLE_PROGRAMS)])

    def _turn(self, rng: random.Random, new_tokens: int) -> ScriptedTurn:
        tool = rng.choices(self.tools, [tool.share for tool in self.tools])[0]
        return ScriptedTurn(new_tokens, self.output_tokens.count(rng), tool.seconds.draw(rng), tool.name)


def mean_context_tokens(scripts: Sequence[Script]) -> float:
    """Mean over all turns of the context when the turn ends."""
    contexts = []
    for script in scripts:
        context = 0
        for turn in script.turns:
            context += turn.new_tokens + turn.output_tokens
            contexts.append(context)
    return statistics.fmean(contexts)


def short_tools(config: WorkloadConfig | None = None) -> Mix:
    """The live bench's workload, by its own settings: `bench.workload` draws its lengths from the
    same laws (these are other draws)."""
    config = config or WorkloadConfig()

    def length(mean: int) -> Law:
        return Law(mean, config.spread, most=2 * mean)

    return Mix(
        name=config.name,
        turns=Law(config.num_turns, 0.0),
        prompt_tokens=length(config.prompt_tokens),
        observation_tokens=length(config.observation_tokens),
        output_tokens=length(config.output_tokens),
        tools=tuple(Tool(tool.name, tool.share, Law(tool.mean_s, tool.spread, most=math.inf)) for tool in config.tools),
        stated_context_tokens=live.mean_context_tokens(config),
    )


def mini_swe_agent() -> Mix:
    """SWE tasks by mini-SWE-agent: 34 turns, one shell command each (turn counts of R2E-Gym 16,
    SWE-Gym 19, SWE-agent 26, SWE-smith 30, mini-swe-agent 34, OpenHands 64 in their papers). It cuts
    an observation at 10,000 characters (its default config), some 2,500 tokens. Ours: mean lengths
    and a tool mix of quick file commands and slower test runs, mean 1.6 s (the ThunderAgent paper,
    arXiv 2602.13692, calls its tools light and predictable)."""
    return Mix(
        name="mini_swe_agent",
        turns=Law(34, 0.4, least=4, most=100),
        system_tokens=1_200,
        prompt_tokens=Law(900, 0.6),
        observation_tokens=Law(550, 1.0, most=2_500),
        output_tokens=Law(180, 0.6),
        tools=(Tool("shell", 0.85, Law(0.4, 0.8)), Tool("tests", 0.15, Law(8.0, 0.8))),
    )


def openhands() -> Mix:
    """SWE tasks by OpenHands: 64 turns (see `mini_swe_agent`), a long system prompt with tool schemas
    and longer observations. Ours: the lengths and the tool times."""
    return Mix(
        name="openhands",
        turns=Law(64, 0.4, least=8, most=150),
        system_tokens=5_000,
        prompt_tokens=Law(1_200, 0.6),
        observation_tokens=Law(650, 1.0, most=4_000),
        output_tokens=Law(230, 0.6),
        tools=(
            Tool("edit", 0.55, Law(0.3, 0.6)),
            Tool("shell", 0.33, Law(1.5, 0.9)),
            Tool("tests", 0.12, Law(15.0, 0.8)),
        ),
    )


def tool_orchestration() -> Mix:
    """Calls of remote tools and models, as ToolOrchestra makes them (the ThunderAgent paper, arXiv
    2602.13692: long and unpredictable), with the tail measured in agent traffic: 4% of the calls take
    over a minute and hold 85% of all tool time. Ours: everything else."""
    return Mix(
        name="tool_orchestration",
        turns=Law(14, 0.4, least=3, most=40),
        system_tokens=2_500,
        prompt_tokens=Law(1_000, 0.6),
        observation_tokens=Law(900, 0.9, most=8_000),
        output_tokens=Law(350, 0.6),
        tools=(Tool("quick", 0.96, Law(2.6, 1.1, most=60)), Tool("slow", 0.04, Law(350, 0.7, least=60, most=1_800))),
    )


def science_agent() -> Mix:
    """Scientific discovery, which the ThunderAgent paper (arXiv 2602.13692) evaluates too: few turns,
    long outputs of code, experiments that run for minutes. All numbers are ours."""
    return Mix(
        name="science_agent",
        turns=Law(18, 0.4, least=4, most=50),
        system_tokens=2_000,
        prompt_tokens=Law(3_000, 0.6),
        observation_tokens=Law(1_200, 0.9, most=8_000),
        output_tokens=Law(900, 0.6),
        tools=(Tool("edit", 0.5, Law(1.0, 0.6)), Tool("experiment", 0.5, Law(45.0, 1.0, most=600))),
    )


def grpo_groups() -> Mix:
    """Eight samples of each prompt (GRPO's usual group), otherwise SWE tasks in few turns as in
    R2E-Gym (16); a group shares its whole first prompt. Ours: the lengths and the tool times."""
    return Mix(
        name="grpo_groups",
        turns=Law(16, 0.4, least=3, most=50),
        system_tokens=1_200,
        prompt_tokens=Law(5_000, 0.5),
        observation_tokens=Law(450, 0.9, most=2_500),
        output_tokens=Law(200, 0.6),
        tools=(Tool("shell", 0.85, Law(0.4, 0.8)), Tool("tests", 0.15, Law(8.0, 0.8))),
        group_size=8,
    )


def coding_assistant() -> Mix:
    """Coding assistants in daily use: medians of 43 turns, 119k tokens of prefix, 875 appended and
    214 generated a turn; 4% of the tool calls take over a minute and hold 85% of the tool time (traces
    of such traffic: TraceLab, arXiv 2606.30560). The first prompt, ours, makes the median prefix right."""
    return Mix(
        name="coding_assistant",
        turns=Law(49, 0.5, least=8, most=160),  # median 43
        system_tokens=14_000,
        prompt_tokens=Law(68_000, 0.35, most=150_000),
        observation_tokens=Law(1_120, 0.7),  # median 875
        output_tokens=Law(256, 0.6),  # median 214
        tools=(Tool("quick", 0.96, Law(1.4, 1.0, most=60)), Tool("slow", 0.04, Law(190, 0.7, least=60, most=1_800))),
    )


def mixed_sizes() -> Mix:
    """First prompts from 1k to 100k tokens, lengths otherwise alike: does anyone starve? (The field
    reports 0.5 s against 404 s to the first token under smallest first.) All numbers are ours."""
    return Mix(
        name="mixed_sizes",
        turns=Law(12, 0.3, least=4, most=30),
        prompt_tokens=Law(18_000, 1.3, least=1_000, most=100_000),
        observation_tokens=Law(400, 0.6),
        output_tokens=Law(150, 0.5),
        tools=(Tool("shell", 1.0, Law(1.0, 0.8)),),
    )


_MIXES: Mapping[str, Callable[[], Mix]] = {
    make.__name__: make
    for make in (
        short_tools,
        mini_swe_agent,
        openhands,
        tool_orchestration,
        science_agent,
        grpo_groups,
        coding_assistant,
        mixed_sizes,
    )
}
WORKLOADS = tuple(_MIXES)


def make_workload(name: str) -> Workload:
    if name not in _MIXES:
        raise ConfigError(f"workloads: no workload {name!r}; it must be one of {', '.join(WORKLOADS)}, or set `trace`")
    return _MIXES[name]()
