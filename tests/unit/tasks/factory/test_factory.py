"""Tasks out of a tiny package, in real local sandboxes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_package import FILES, write_distribution
from tests.unit.tasks.test_grading import locally
from thunder_rollout.errors import TaskError
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.sandbox.protocol import ExecResult, Sandbox, SandboxSpec
from thunder_rollout.tasks.environment import sandbox_spec, started, top_modules
from thunder_rollout.tasks.factory.config import FactoryConfig
from thunder_rollout.tasks.factory.factory import Progress, draw_bugs, make_tasks
from thunder_rollout.tasks.factory.journal import Attempt, Journal
from thunder_rollout.tasks.factory.package import load_package
from thunder_rollout.tasks.factory.statement import problem_statement
from thunder_rollout.tasks.factory.suite import Place
from thunder_rollout.tasks.grading import grade
from thunder_rollout.tasks.loaders import load_tasks, save_tasks
from thunder_rollout.tasks.task import Task

NUMBERS = "src/tiny/numbers.py"


def local(spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
    return started(LocalSandbox(spec))


def configured(folder: Path, **settings: Any) -> tuple[Place, FactoryConfig]:
    config = FactoryConfig(package="tiny", path=str(write_distribution(folder)), **settings)
    return Place(package=load_package(config), image="thunder-toy:1", built=False), config


async def make(folder: Path, journal: Path | None = None, **settings: Any) -> Progress:
    place, config = configured(folder, **settings)
    with Journal(journal or folder / "tried.jsonl", "settings") as tried:
        return await make_tasks(place, config, local, tried)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, local_sandboxes: None) -> Progress:
    return asyncio.run(make(tmp_path_factory.mktemp("made"), count=3))


def test_tests_that_fail_without_a_bug_are_left_out(made: Progress) -> None:
    assert made.stable_tests == 7
    named = {test for task in made.tasks for test in task.fail_to_pass + task.pass_to_pass}
    assert "tests/test_numbers.py::test_version" in named
    assert "tests/test_numbers.py::test_broken" not in named


def test_a_task_has_a_short_bug_and_hides_the_tests_that_notice_it(made: Progress) -> None:
    assert len(made.tasks) == 3
    for task in made.tasks:
        changed = [line for line in task.patch.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        assert 1 <= len(changed) <= 4
        assert set(task.test_files) == {"tests/test_numbers.py"}
        assert "/testbed/tests/test_numbers.py" not in task.files
        assert "/testbed/tests/test_other.py" in task.files
        assert task.files[f"/testbed/{NUMBERS}"].decode() != FILES[NUMBERS]
        assert task.self_contained and task.fail_to_pass and task.pass_to_pass


def test_the_statement_shows_the_failing_check(made: Progress) -> None:
    for task in made.tasks:
        assert "tiny doesn't behave as it should" in task.problem_statement
        assert "def test_" in task.problem_statement and "from tiny.numbers import" in task.problem_statement
        assert "src/tiny" not in task.problem_statement and "line" not in task.problem_statement


async def test_a_task_from_its_file_is_solved_by_undoing_the_bug(made: Progress, tmp_path: Path) -> None:
    save_tasks(made.tasks, tmp_path / "tasks.parquet")
    task = load_tasks(tmp_path / "tasks.parquet")[0]
    async with local(sandbox_spec(task, for_agent=True)) as box:
        look = "git rev-parse HEAD; git log --oneline | wc -l; git status --short; ls tests"
        seen = (await box.exec(f"{look}; python -m pytest -q tests -c /dev/null", timeout_s=60)).output
        assert seen.startswith(f"{task.base_commit}\n1\ntest_other.py\n") and "1 passed" in seen
        await box.write_file(f"/testbed/{NUMBERS}", FILES[NUMBERS].encode())
        patch = await box.diff("HEAD")
    assert (await grade(task, patch, locally(task))).resolved


async def test_the_same_seed_gives_the_same_tasks_however_many_at_once(made: Progress, tmp_path: Path) -> None:
    again = await make(tmp_path, count=3, concurrency=1, validate=False)
    assert again.tasks == made.tasks


async def test_what_was_tried_is_not_tried_again(tmp_path: Path, local_sandboxes: None) -> None:
    first = await make(tmp_path, count=2, validate=False)
    starts = 0

    @asynccontextmanager
    async def counted(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        nonlocal starts
        starts += 1
        async with local(spec) as box:
            yield box

    place, config = configured(tmp_path, count=2, validate=False, concurrency=1)
    with Journal(tmp_path / "tried.jsonl", "settings") as journal:
        assert (await make_tasks(place, config, counted, journal)).tasks == first.tasks
    assert starts == 2  # the suite without a bug


async def test_no_more_tasks_of_one_function_than_asked(tmp_path: Path, local_sandboxes: None) -> None:
    progress = await make(tmp_path, count=9, max_per_function=1, max_tried=8, validate=False)
    functions = [task.extra["function"] for task in progress.tasks]
    assert len(functions) == len(set(functions)) <= 2
    assert sum(progress.outcomes.values()) == 8


async def test_a_task_that_grades_wrongly_is_invalid(
    made: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "thunder_rollout.tasks.factory.factory.make_patch", lambda before, after: made.tasks[0].patch[:40]
    )
    progress = await make(tmp_path, count=1, max_tried=2)
    assert not progress.tasks and progress.outcomes["invalid"] >= 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ExecResult(exit_code=124, output="", timed_out=True, took_s=1.0), "timed out without a bug"),
        (ExecResult(exit_code=4, output="usage", timed_out=False, took_s=0.1), "no report without a bug.*usage"),
    ],
)
async def test_a_suite_that_doesnt_run_is_no_package(tmp_path: Path, answer: ExecResult, words: str) -> None:
    place, config = configured(tmp_path)
    with Journal(tmp_path / "tried.jsonl", "") as journal, pytest.raises(TaskError, match=words):
        await make_tasks(place, config, lambda spec: started(FakeSandbox(spec, lambda command: answer)), journal)


def test_operators_take_turns(tmp_path: Path) -> None:
    place, config = configured(tmp_path)
    bugs = draw_bugs(place.package, config)
    first = [bug.mutation.operator for bug in bugs[:5]]
    assert len(set(first)) == len(first)
    assert len({bug.key for bug in bugs}) == len(bugs)
    assert bugs == draw_bugs(place.package, config)
    assert bugs != draw_bugs(place.package, replace(config, seed=1))


def test_a_journal_of_other_settings_is_begun_anew(tmp_path: Path, toy_task: Task) -> None:
    path = tmp_path / "tried.jsonl"
    with Journal(path, "a") as journal:
        journal.note(Attempt(key="1", outcome="kept", task=toy_task))
    path.write_text(path.read_text() + '{"key": "2", "outc')
    with Journal(path, "a") as journal:
        assert journal.find("1") == Attempt(key="1", outcome="kept", task=toy_task)
        assert journal.find("2") is None
    with Journal(path, "b") as journal:
        assert journal.find("1") is None


LONG_TEST = """\
import os, json as j
from a import b, c

SIZE = 3


def make():
    return SIZE


def other():
    pass


class TestA:
    def test_b(self, x):
        assert make()
"""


def test_a_statement_names_the_case_and_cuts_long_tests() -> None:
    source = LONG_TEST + "".join(f"        x{i} = {i}\n" for i in range(60))
    told = "t.py:9: in test_b\nE   assert <object at 0x7f0011223344> == 1\n"
    text = problem_statement("tiny", ["t.py::TestA::test_b[1]"], {"t.py": source}, {"t.py::TestA::test_b[1]": told})
    assert "A check fails that ought to pass" in text
    assert "(case `test_b[1]`)" in text
    assert "\ndef test_b(self, x):\n    assert make()\n    x0 = 0\n" in text and "\n    ...\n" in text
    assert "def make():\n    return SIZE\n" in text and "def other" not in text
    assert "import" not in text and "assert <object at 0x...> == 1" in text


def test_a_task_of_an_installed_package_shows_no_other_copy_of_it(tmp_path: Path) -> None:
    place, _ = configured(tmp_path)
    assert top_modules(place.package.files) == ("tiny",)
    modules = ("src/idna/__init__.py", "src/idna/core.py", "six.py", "tests/__init__.py", "setup.py")
    files = dict.fromkeys([f"/testbed/{path}" for path in modules] + ["/opt/site/attr/__init__.py"], b"")
    task = Task(
        instance_id="a", repo="a", base_commit="", problem_statement="a", image="none", fail_to_pass=("t.py::a",),
        files=files,
    )  # fmt: skip
    for for_agent in (True, False):
        assert sandbox_spec(task, for_agent=for_agent).hidden_modules == ("idna", "six")
