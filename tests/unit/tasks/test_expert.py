"""The expert's computed transcripts are what really running its commands gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.tasks.test_toy import check_out, sh
from thunder_rollout.agent.actions import Action, parse_action
from thunder_rollout.tasks.toy import DIFFICULTIES
from thunder_rollout.tasks.toy.expert import expert_turns
from thunder_rollout.tasks.toy.generator import problem_stream, to_task


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_outputs_are_those_of_a_shell(tmp_path: Path, difficulty: str) -> None:
    problems = problem_stream("expert", difficulty)
    for index in range(3):
        problem = next(problems)
        folder = check_out(to_task(problem, str(index), difficulty), tmp_path / str(index))
        turns = expert_turns(problem, random.Random(index), mistake_share=1.0)
        for turn in turns[:-1]:
            ran = sh(turn.command, folder)
            assert (ran.returncode, ran.stdout, ran.stderr) == (0, turn.output, "")
        fixed = {path: (folder / path).read_text() for path in problem.files()}
        assert fixed == problem.files(fixed=True)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_turn_is_an_action_and_the_last_submits(difficulty: str) -> None:
    turns = expert_turns(next(problem_stream("actions", difficulty)), random.Random(0))
    assert [parse_action(turn.text) for turn in turns] == [
        Action(turn.command, submit=turn is turns[-1]) for turn in turns
    ]


def test_mistakes_are_marked_and_mended() -> None:
    problems = problem_stream("mistakes", "easy")
    transcripts = [expert_turns(next(problems), random.Random(seed), mistake_share=1.0) for seed in range(40)]
    mistaken = [turns for turns in transcripts if not all(turn.imitate for turn in turns)]
    assert len(mistaken) > 10
    for turns in mistaken:
        (wrong,) = [turn for turn in turns if not turn.imitate]
        right = turns[turns.index(wrong) + 2]
        assert right.command != wrong.command and right.imitate
