"""How someone who knows the bug would fix a toy problem, turn by turn, and how a hasty one would.

The outputs are computed here and equal what a real sandbox gives (a test runs a sample), so
thousands of transcripts take seconds. Some transcripts begin with a wrong fix, which is not to
be imitated, to show how one recovers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from thunder_rollout.agent.actions import SUBMIT
from thunder_rollout.tasks.toy.generator import evaluate, show
from thunder_rollout.tasks.toy.problem import BugSite, ToyProblem
from thunder_rollout.tasks.toy.templates import Bug

_LINES_AFTER_HEAD_EASY = 2  # a docstring and one line
_LINES_AFTER_HEAD = 8  # the longest template has seven lines
_HASTY_RIGHT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTurn:
    """`imitate` is False for a deliberate mistake: it is context, not a lesson."""

    thought: str
    command: str
    output: str = ""
    imitate: bool = True

    @property
    def text(self) -> str:
        """The assistant's message in the agent's action format."""
        return f"{self.thought}\n```bash\n{self.command}\n```"


def expert_turns(problem: ToyProblem, rng: random.Random, mistake_share: float = 0.0) -> list[ExpertTurn]:
    """A transcript that ends in `submit` with every bug fixed; every command exits with 0."""
    lines = {path: text.splitlines() for path, text in problem.files().items()}
    turns: list[ExpertTurn] = []
    for site in problem.bug_sites:
        mistakes = _convincing_mistakes(site) if rng.random() < mistake_share else []
        turns += _fix(site, lines[site.path], rng.choice(mistakes) if mistakes else None, problem.names_file)
        lines[site.path][site.number - 1] = site.good
    return [*turns, ExpertTurn(thought="The fix works.", command=SUBMIT)]


def hasty_turns(problem: ToyProblem, rng: random.Random) -> list[ExpertTurn]:
    """A transcript of one who writes what the line could be, seldom what it should be, and submits it unchecked, all
    in other words than the expert's: that it pays less to imitate him is left to find out."""
    turns: list[ExpertTurn] = []
    lines = {path: text.splitlines() for path, text in problem.files().items()}
    for site in problem.bug_sites:
        bugs = [bug for bug in (site.function.bug, *site.function.other_bugs) if bug is not None]
        is_right = rng.random() < _HASTY_RIGHT_SHARE
        guess = site.good if is_right else "    " + rng.choice(bugs).bad
        turns += [
            _find(site, lines[site.path], problem.names_file, thought="Let me see."),
            _replace_line(site, guess, thought="This should do."),
        ]
        lines[site.path][site.number - 1] = guess
    return [*turns, ExpertTurn(thought="Done.", command=SUBMIT)]


def _fix(site: BugSite, lines: list[str], mistake: Bug | None, names_file: bool) -> Iterator[ExpertTurn]:
    yield _find(site, lines, names_file)
    if mistake is not None:
        yield _replace_line(site, "    " + mistake.bad, imitate=False)
        yield _check(site, show(evaluate(site.function, mistake, site.example.arguments)))
    yield _replace_line(site, site.good)
    yield _check(site, show(site.example.expected))


def _find(site: BugSite, lines: list[str], names_file: bool, *, thought: str = "") -> ExpertTurn:
    """Show the function with its line numbers, as grep does."""
    head = f"def {site.function.name}("
    first = next(index for index, line in enumerate(lines) if line.startswith(head))
    after = _LINES_AFTER_HEAD if not names_file else _LINES_AFTER_HEAD_EASY
    where, prefix = (site.path, "") if names_file else ("-r .", f"./{site.path}")
    shown = [f"{first + 1}:{lines[first]}"]
    shown += [f"{number}-{line}" for number, line in enumerate(lines[first + 1 : first + 1 + after], first + 2)]
    if prefix:
        shown = [f"{prefix}:{shown[0]}", *(f"{prefix}-{line}" for line in shown[1:])]
    return ExpertTurn(
        thought=thought or f"I look at {site.function.name}.",
        command=f"grep -n -A {after} '{head}' {where}",
        output="".join(f"{line}\n" for line in shown),
    )


def _replace_line(site: BugSite, line: str, *, thought: str = "", imitate: bool = True) -> ExpertTurn:
    return ExpertTurn(
        thought=thought or f"{site.function.name} should return {site.function.doc}. Line {site.number} is wrong.",
        command=f"sed -i '{site.number}c\\{line}' {site.path}",
        imitate=imitate,
    )


def _check(site: BugSite, shown: str) -> ExpertTurn:
    return ExpertTurn(
        thought=f"It should show {site.example.expected}.", command=site.check_command, output=f"{shown}\n"
    )


def _convincing_mistakes(site: BugSite) -> list[Bug]:
    """Wrong fixes of the same line whose output can be seen to be wrong (no traceback)."""
    right = show(site.example.expected)
    values = [(bug, evaluate(site.function, bug, site.example.arguments)) for bug in site.function.other_bugs]
    return [bug for bug, value in values if not isinstance(value, Exception) and show(value) != right]
