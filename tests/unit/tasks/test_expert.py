"""The expert's computed transcripts are what really running its commands gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.tasks.test_toy import check_out, sh
from thunder_rollout.agent.actions import Action, parse_action
from thunder_rollout.tasks.toy import DIFFICULTIES
from thunder_rollout.tasks.toy.expert import ExpertTurn, expert_turns, hasty_turns
from thunder_rollout.tasks.toy.generator import problem_stream, to_task
from thunder_rollout.tasks.toy.problem import ToyProblem


def expert(problem: ToyProblem, rng: random.Random) -> list[ExpertTurn]:
    return expert_turns(problem, rng, mistake_share=1.0)


@pytest.mark.parametrize("turns_of", [expert, hasty_turns])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_outputs_are_those_of_a_shell(
    tmp_path: Path, difficulty: str, turns_of: Callable[[ToyProblem, random.Random], list[ExpertTurn]]
) -> None:
    problems = problem_stream("expert", difficulty)
    for index in range(3):
        problem = next(problems)
        folder = check_out(to_task(problem, str(index), difficulty), tmp_path / str(index))
        turns = turns_of(problem, random.Random(index))
        for turn in turns[:-1]:
            ran = sh(turn.command, folder)
            assert (ran.returncode, ran.stdout, ran.stderr) == (0, turn.output, "")
        if turns_of is expert:
            fixed = {path: (folder / path).read_text() for path in problem.files()}
            assert fixed == problem.files(fixed=True)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_turn_is_an_action_and_the_last_submits(difficulty: str) -> None:
    for turns_of in (expert, hasty_turns):
        turns = turns_of(next(problem_stream("actions", difficulty)), random.Random(0))
        assert [parse_action(turn.text) for turn in turns] == [
            Action(turn.command, submit=turn is turns[-1]) for turn in turns
        ]


def test_who_is_in_haste_tells_it_by_the_first_word_and_is_right_now_and_then() -> None:
    problems = [next(stream) for stream in [problem_stream("haste", "easy")] for _ in range(60)]
    hasty = [hasty_turns(problem, random.Random(index)) for index, problem in enumerate(problems)]
    careful = [expert_turns(problem, random.Random(index)) for index, problem in enumerate(problems)]
    first_words = [{turns[0].thought.split()[0] for turns in made} for made in (hasty, careful)]
    assert first_words[0].isdisjoint(first_words[1])
    right = [turns[1].command == expected[1].command for turns, expected in zip(hasty, careful, strict=True)]
    assert 0.1 < sum(right) / len(right) < 0.5


def test_mistakes_are_marked_and_mended() -> None:
    problems = problem_stream("mistakes", "easy")
    transcripts = [expert_turns(next(problems), random.Random(seed), mistake_share=1.0) for seed in range(40)]
    mistaken = [turns for turns in transcripts if not all(turn.imitate for turn in turns)]
    assert len(mistaken) > 10
    for turns in mistaken:
        (wrong,) = [turn for turn in turns if not turn.imitate]
        right = turns[turns.index(wrong) + 2]
        assert right.command != wrong.command and right.imitate
