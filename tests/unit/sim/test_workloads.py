"""The generators keep what their sources publish."""

from __future__ import annotations

import statistics

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.workloads import WORKLOADS, Script, make_workload

NUM_PROGRAMS = 300


def scripts(name: str) -> list[Script]:
    workload = make_workload(name)
    return [workload.script(index, seed=0) for index in range(NUM_PROGRAMS)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_program_depends_on_its_index_and_the_seed_alone(name: str) -> None:
    workload = make_workload(name)
    assert workload.script(7, 1) == make_workload(name).script(7, 1)
    assert workload.script(7, 1) != workload.script(8, 1)
    assert workload.script(7, 1) != workload.script(7, 2)
    assert workload.mean_context_tokens() > 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_turns_are_possible_and_shared_heads_lie_in_the_first_prompt(name: str) -> None:
    for script in scripts(name):
        assert all(turn.new_tokens >= 1 and turn.output_tokens >= 1 and turn.tool_s >= 0 for turn in script.turns)
        assert sum(tokens for _, tokens in script.shared) <= script.turns[0].new_tokens


@pytest.mark.parametrize(("name", "turns"), [("mini_swe_agent", 34), ("openhands", 64), ("grpo_groups", 16)])
def test_turn_counts_are_the_published_ones(name: str, turns: int) -> None:
    assert statistics.fmean(len(script.turns) for script in scripts(name)) == pytest.approx(turns, rel=0.08)


def test_coding_assistant_has_the_published_medians() -> None:
    programs = scripts("coding_assistant")
    prompts = []
    for script in programs:
        context = 0
        for turn in script.turns:
            prompts.append(context + turn.new_tokens)
            context += turn.new_tokens + turn.output_tokens
    assert statistics.median(len(script.turns) for script in programs) == pytest.approx(43, rel=0.1)
    assert statistics.median(prompts) == pytest.approx(119_000, rel=0.1)
    appended = statistics.median(turn.new_tokens for script in programs for turn in script.turns[1:])
    assert appended == pytest.approx(875, rel=0.1)
    assert statistics.median(t.output_tokens for s in programs for t in s.turns) == pytest.approx(214, rel=0.1)


@pytest.mark.parametrize("name", ["tool_orchestration", "coding_assistant"])
def test_few_tools_hold_most_of_the_time(name: str) -> None:
    times = [turn.tool_s for script in scripts(name) for turn in script.turns]
    slow = [time for time in times if time >= 60]
    assert len(slow) / len(times) == pytest.approx(0.04, abs=0.01)
    assert sum(slow) / sum(times) == pytest.approx(0.85, abs=0.06)


def test_a_group_shares_its_whole_prompt() -> None:
    programs = scripts("grpo_groups")
    assert len({script.group for script in programs[:8]}) == 1
    assert len({script.turns[0].new_tokens for script in programs[:8]}) == 1
    assert programs[0].group != programs[8].group
    assert sum(tokens for _, tokens in programs[0].shared) == programs[0].turns[0].new_tokens


def test_an_aged_program_has_its_past_in_its_prompt() -> None:
    script = make_workload("short_tools").script(0, 0)
    aged = script.aged(5)
    assert len(aged.turns) == len(script.turns) - 5
    assert aged.longest_context_tokens == script.longest_context_tokens
    assert script.aged(0) is script


def test_an_unknown_workload_is_named() -> None:
    with pytest.raises(ConfigError, match="short_tool"):
        make_workload("short_tool")
