"""The scripts: repeatable, and of the shape that their workload states."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from thunder_rollout.bench.config import BenchConfig, WorkloadConfig
from thunder_rollout.bench.workload import Position, Script, longest_context_tokens, mean_context_tokens, script
from thunder_rollout.config import compose_config, to_typed

NUM_PROGRAMS = 300
WORKLOADS = to_typed(BenchConfig, compose_config("bench", [])).workload


def programs(workload: WorkloadConfig, seed: int = 0) -> list[Script]:
    return [script(workload, Position(index, 0), seed=seed, vocab_size=4096) for index in range(NUM_PROGRAMS)]


def contexts(program: Script) -> list[int]:
    total, found = 0, []
    for turn in program.turns:
        total += len(turn.new_ids) + turn.output_tokens
        found.append(total)
    return found


def test_a_program_depends_on_its_index_and_the_seed_alone():
    workload = WORKLOADS["short_tools"]
    assert programs(workload)[3] == programs(workload)[3]
    assert programs(workload)[3].turns != programs(workload)[4].turns
    assert programs(workload)[3].turns != programs(workload, seed=1)[3].turns


@pytest.mark.parametrize("name", WORKLOADS)
def test_contexts_are_as_stated(name):
    workload = replace(WORKLOADS[name], name=name)
    sizes = [contexts(program) for program in programs(workload)]
    assert statistics.fmean(size for of_one in sizes for size in of_one) == pytest.approx(
        mean_context_tokens(workload), rel=0.1
    )
    assert max(of_one[-1] for of_one in sizes) <= longest_context_tokens(workload)
    assert mean_context_tokens(workload) == pytest.approx(3200, rel=0.02), "loads compare over workloads"


def test_the_tail_of_heavy_tools_is_twenty_times_their_median():
    seconds = sorted(turn.tool_s for program in programs(WORKLOADS["heavy_tails"]) for turn in program.turns)
    assert seconds[int(0.95 * len(seconds))] / statistics.median(seconds) == pytest.approx(20, rel=0.2)


def test_the_samples_of_a_group_share_their_first_prompt_and_nothing_else():
    first, second, *_, last = programs(WORKLOADS["groups"])[:9]
    assert first.group == second.group != last.group
    assert first.turns[0].new_ids == second.turns[0].new_ids != last.turns[0].new_ids
    assert first.turns[1].new_ids != second.turns[1].new_ids


def test_sizes_are_mixed():
    prompts = [len(program.turns[0].new_ids) for program in programs(WORKLOADS["mixed_contexts"])]
    assert max(prompts) / min(prompts) > 13


def test_a_program_that_grows_beyond_its_bound_ends_before():
    short = replace(WORKLOADS["short_tools"], max_context_tokens=3000)
    assert all(contexts(program)[-1] <= 3000 for program in programs(short))
    assert min(len(program.turns) for program in programs(short)) < 12


def test_a_program_can_go_on_after_turns_that_are_over():
    workload = WORKLOADS["short_tools"]
    whole = script(workload, Position(5, 0), seed=0, vocab_size=4096)
    aged = script(workload, Position(5, 3), seed=0, vocab_size=4096)
    assert aged.turns == whole.turns[3:]
    assert aged.num_turns_over == 3
    assert len(aged.context_ids) == contexts(whole)[2]
    assert aged.context_ids[: len(whole.turns[0].new_ids)] == whole.turns[0].new_ids


def test_any_few_programs_in_a_row_have_all_sizes():
    mixed = replace(WORKLOADS["mixed_contexts"], spread=0.0)
    sizes = [len(program.turns[0].new_ids) for program in programs(mixed)]
    means = [statistics.fmean(sizes[start : start + 16]) for start in range(0, len(sizes) - 16, 16)]
    assert max(means) / min(means) < 1.25, "independent draws differ by a factor of two"
