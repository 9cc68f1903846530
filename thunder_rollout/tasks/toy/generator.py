"""Toy bug-fix tasks: as many as asked, the same for the same seed, valid by construction.

Each task is a real git repository with visible tests of what works and hidden tests of what
should. Every example is computed from the right and the wrong version of its function, so the
wrong repository fails all FAIL_TO_PASS and passes all PASS_TO_PASS, and the right one passes
both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import words
from thunder_rollout.tasks.toy.examples import draw_arguments, draw_names
from thunder_rollout.tasks.toy.problem import Example, ToyFunction, ToyModule, ToyProblem
from thunder_rollout.tasks.toy.repository import SETUP, commit_id
from thunder_rollout.tasks.toy.templates import ONE_LINE, SHORT_LOOPS, Bug, FunctionTemplate

TOY_IMAGE = "thunder-toy:1"  # the Docker image with python, pytest and git that sandbox.images makes
WORKDIR = "/testbed"
# Neither the repository's pytest configuration and plugins nor installed plugins take part, nor pytest's own
# that collects garbage at the end, a tenth of so short a run's CPU time.
TEST_COMMAND = (
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -q -c /dev/null --rootdir=. --noconftest -p no:cacheprovider"
    " -p no:unraisableexception"
)
_MAX_EXAMPLE_DRAWS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    num_modules: int
    num_functions: int  # per module
    num_bugs: int  # each in its own module
    names_file: bool
    templates: tuple[FunctionTemplate, ...]


DIFFICULTIES = {
    "easy": Difficulty(num_modules=1, num_functions=3, num_bugs=1, names_file=True, templates=ONE_LINE),
    "medium": Difficulty(
        num_modules=2, num_functions=4, num_bugs=1, names_file=False, templates=ONE_LINE + SHORT_LOOPS
    ),
    "hard": Difficulty(num_modules=3, num_functions=5, num_bugs=2, names_file=False, templates=ONE_LINE + SHORT_LOOPS),
}


def generate(seed: int, count: int, difficulty: str = "easy") -> list[Task]:
    """`count` tasks; a longer list of the same seed begins with the shorter one."""
    problems = problem_stream(f"task:{seed}", difficulty)
    return [to_task(next(problems), f"toy-{difficulty}-{seed}-{index}", difficulty) for index in range(count)]


def problem_stream(seed: str, difficulty: str) -> Iterator[ToyProblem]:
    """Problems without end, the same for the same `seed`."""
    index = 0
    while True:
        yield draw_problem(random.Random(f"{seed}:{difficulty}:{index}"), DIFFICULTIES[difficulty])
        index += 1


def to_task(problem: ToyProblem, instance_id: str, difficulty: str) -> Task:
    files = {path: text.encode() for path, text in problem.files().items()}
    return Task(
        instance_id=instance_id,
        repo=f"toy/{problem.package}",
        base_commit=commit_id(files),
        problem_statement=problem.statement,
        image=TOY_IMAGE,
        fail_to_pass=problem.test_ids(passing=False),
        pass_to_pass=problem.test_ids(passing=True),
        patch=problem.patch(),
        workdir=WORKDIR,
        files={f"{WORKDIR}/{path}": content for path, content in files.items()},
        setup=SETUP.format(workdir=WORKDIR),
        test_files=problem.test_files(hidden=True),
        test_command=TEST_COMMAND,
        self_contained=True,
        kind="toy",
        extra={"difficulty": difficulty},
    )


def draw_problem(rng: random.Random, difficulty: Difficulty) -> ToyProblem:
    num_functions = difficulty.num_modules * difficulty.num_functions
    function_names = _function_names(num_functions, rng)
    templates = rng.sample(difficulty.templates, num_functions)
    buggy_modules = set(rng.sample(range(difficulty.num_modules), difficulty.num_bugs))
    modules = []
    for index, name in enumerate(rng.sample(words.MODULES, difficulty.num_modules)):
        buggy = rng.randrange(difficulty.num_functions) if index in buggy_modules else -1
        functions = tuple(
            _draw_function(function_names.pop(), templates.pop(), buggy=position == buggy, rng=rng)
            for position in range(difficulty.num_functions)
        )
        modules.append(ToyModule(name=name, functions=functions))
    return ToyProblem(package=rng.choice(words.PACKAGES), modules=tuple(modules), names_file=difficulty.names_file)


def evaluate(function: ToyFunction, bug: Bug | None, arguments: tuple[Any, ...]) -> Any:
    """What `function` returns with `bug`; an exception it raises is returned."""
    return _call(_compiled(function, bug), arguments)


def _function_names(count: int, rng: random.Random) -> list[str]:
    """Names without a common word, so that none is part of another."""
    pairs = zip(rng.sample(words.VERBS, count), rng.sample(words.NOUNS, count), strict=True)
    return [f"{verb}_{noun}" for verb, noun in pairs]


def _draw_function(name: str, template: FunctionTemplate, *, buggy: bool, rng: random.Random) -> ToyFunction:
    """Names and constants are drawn again until a bug shows in an example."""
    while True:
        params = draw_names(template.kinds, rng)
        k, other = rng.sample(range(2, 10), 2)
        filling = dict(zip("ab", params, strict=False)) | {"k": str(k), "other": str(other)}
        function = ToyFunction(
            name=name,
            params=tuple(params),
            doc=_fill_doc(template, filling),
            body=tuple(template.fixed(filling)),
            examples=(),
        )
        if buggy:
            bugs = template.bugs(filling)
            bug = rng.choice(bugs)
            others = tuple(other for other in bugs if other.line == bug.line and other != bug)
            function = replace(function, bug=bug, other_bugs=others)
        examples = _draw_examples(function, template.kinds, rng)
        if examples:
            return replace(function, examples=examples)


def _draw_examples(function: ToyFunction, kinds: tuple[str, ...], rng: random.Random) -> tuple[Example, ...]:
    """Two that pass without a bug; with one, two that fail, one that passes and one against each
    other bug in that place (where there are such); empty if the bug doesn't show."""
    right, wrong = _compiled(function, None), _compiled(function, function.bug)
    wanted = {True: 2, False: 0} if function.bug is None else {True: 1, False: 2}
    unseen_bugs = [_compiled(function, bug) for bug in function.other_bugs]
    chosen: list[Example] = []
    for _ in range(_MAX_EXAMPLE_DRAWS):
        if not any(wanted.values()) and not unseen_bugs:
            break
        arguments = draw_arguments(kinds, rng)
        expected, actual = _call(right, arguments), _call(wrong, arguments)
        passes = _same(expected, actual)
        survivors = [bug for bug in unseen_bugs if _same(expected, _call(bug, arguments))]
        if not wanted[passes] and len(survivors) == len(unseen_bugs):
            continue
        if any(arguments == example.arguments for example in chosen):
            continue
        chosen.append(Example(arguments=arguments, expected=expected, shown=show(actual), passes=passes))
        unseen_bugs = survivors
        wanted[passes] = max(0, wanted[passes] - 1)
    return tuple(chosen) if not wanted[False] else ()


def show(value: Any) -> str:
    """What printing `value` shows; an exception shows as its type."""
    return f"a {type(value).__name__}" if isinstance(value, Exception) else str(value)


def _same(expected: Any, actual: Any) -> bool:
    return type(expected) is type(actual) and bool(expected == actual)


def _fill_doc(template: FunctionTemplate, filling: dict[str, str]) -> str:
    return FunctionTemplate((), "", (template.doc,)).fixed(filling)[0]


def _compiled(function: ToyFunction, bug: Bug | None) -> Any:
    namespace: dict[str, Any] = {}
    exec("\n".join(function.source(bug)), namespace)
    return namespace[function.name]


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - a bug may raise anything
        return error
