"""The kinds of test suite that can be graded: how each runs and how its verdicts are named.

| suite | names | runner |
|---|---|---|
| `pytest` | node ids, `path::Class::name` | pytest |
| `django` | `name (module.Class)`, or a test's docstring, as in a verbose log | `tests/runtests.py`: unittest |
| `sympy` | bare function names | sympy's own, `bin/test` |
| `r2e` | `Class.name`; each has the status it should have | pytest, in `run_tests.sh` |

Verdicts come from a record that is sealed inside the run (see `seal`), which no print can forge. Django's
and sympy's runners are code of the repository itself: a patch may not touch them (`Suite.runner`), unless the
reference patch does. A name that appears twice passes only if it passed each time.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.patches import written_paths
from thunder_rollout.tasks.seal import AT_START, PLUGIN, passed_in_record, skipped_in_record
from thunder_rollout.tasks.task import Task

_NOT_TESTS = (".cfg", ".csv", ".gif", ".ini", ".jpeg", ".jpg", ".json", ".md", ".pkl", ".png", ".rst", ".toml", ".txt",
              ".yaml", ".yml")  # fmt: skip
_HASH_SEED = 4242
_COLOUR = re.compile(r"\x1b\[[0-9;]*m|\r")


class Suite(Protocol):
    @property
    def plugin(self) -> str:
        """The name under which the grader's plugin is loaded."""

    @property
    def runner(self) -> tuple[str, ...]:
        """Files and folders of the repository that run its tests."""

    def refusal(self, task: Task) -> str:
        """Why the task's tests can't be judged; "" if they can."""

    def command(self, task: Task, tests: Iterable[str]) -> str:
        """Runs at least `tests`, where the plugin is on Python's path; its output is for the log."""

    def verdicts(self, task: Task, record: bytes) -> dict[str, bool]:
        """Whether, by the unsealed record, each test that ran did what it should."""


@dataclass(frozen=True, slots=True)
class _Pytest:
    plugin: str = PLUGIN
    runner: tuple[str, ...] = ()

    def refusal(self, task: Task) -> str:
        return "" if (odd := _without(task, "::")) is None else f"{odd!r} isn't a pytest node id (path::test)"

    def command(self, task: Task, tests: Iterable[str]) -> str:
        files = dict.fromkeys(map(test_file, tests))
        return f"{task.test_command} -p {PLUGIN} {shlex.join(files)}"

    def verdicts(self, task: Task, record: bytes) -> dict[str, bool]:
        exact = passed_in_record(record)
        return _all_passed([*((_published(test), passed) for test, passed in exact.items())]) | exact


@dataclass(frozen=True, slots=True)
class _Django:
    plugin: str = AT_START
    runner: tuple[str, ...] = ("tests/runtests.py", "django/test")

    def refusal(self, task: Task) -> str:
        return "" if self._labels(task) else "its test_patch names no test module to run"

    def command(self, task: Task, tests: Iterable[str]) -> str:
        return f"{task.test_command} {shlex.join(self._labels(task))}"

    def verdicts(self, task: Task, record: bytes) -> dict[str, bool]:
        return passed_in_record(record)

    @staticmethod
    def _labels(task: Task) -> list[str]:
        paths = [path for path in written_paths(task.test_patch) if path.endswith(".py")]
        return [path.removesuffix(".py").removeprefix("tests/").replace("/", ".") for path in paths]


@dataclass(frozen=True, slots=True)
class _Sympy:
    """With a hash seed of its own the runner starts no process anew to set one."""

    plugin: str = AT_START
    runner: tuple[str, ...] = ("bin/test", "sympy/testing", "sympy/utilities/runtests.py", "sympy/utilities/pytest.py")

    def refusal(self, task: Task) -> str:
        return "" if self._files(task) else "its test_patch names no test file to run"

    def command(self, task: Task, tests: Iterable[str]) -> str:
        return f"export PYTHONHASHSEED={_HASH_SEED}\n{task.test_command} {shlex.join(self._files(task))}"

    def verdicts(self, task: Task, record: bytes) -> dict[str, bool]:
        return passed_in_record(record)

    @staticmethod
    def _files(task: Task) -> list[str]:
        return [path for path in written_paths(task.test_patch) if not path.endswith(_NOT_TESTS)]


@dataclass(frozen=True, slots=True)
class _R2e:
    """The task's names are the keys of `expected_output_json`; failing may be what a test should do."""

    plugin: str = PLUGIN
    runner: tuple[str, ...] = (".venv",)

    def refusal(self, task: Task) -> str:
        try:
            return "" if _expected(task) else "expected_output_json is missing"
        except ValueError as error:
            return f"{error}; make expected_output_json a mapping of test names to statuses, or that as JSON"

    def command(self, task: Task, tests: Iterable[str]) -> str:
        return f'export PYTEST_ADDOPTS="-p {PLUGIN} $PYTEST_ADDOPTS"\n{task.test_command}'

    def verdicts(self, task: Task, record: bytes) -> dict[str, bool]:
        expected, skipped = _expected(task), skipped_in_record(record)
        ran = {test: passed for test, passed in passed_in_record(record).items() if test not in skipped}
        named = ((".".join(r2e_name(test).split("::")[1:]), passed) for test, passed in ran.items())
        return _all_passed((name, passed == (expected.get(name) == "PASSED")) for name, passed in named)


SUITES: dict[str, Suite] = {"pytest": _Pytest(), "django": _Django(), "sympy": _Sympy(), "r2e": _R2e()}


def check_gradable(task: Task) -> None:
    """Raises `TaskError` that says why nobody could judge the task's tests."""
    suite = SUITES.get(task.suite)
    if suite is None:
        raise TaskError(f"task {task.instance_id}: suite={task.suite!r}: must be one of {', '.join(SUITES)}")
    if refusal := suite.refusal(task):
        raise TaskError(f"task {task.instance_id}: FAIL_TO_PASS and PASS_TO_PASS can't be judged: {refusal}")


def test_file(test: str) -> str:
    """Where pytest finds it; "" for a name without a file."""
    return test.partition("::")[0] if "::" in test else ""


def is_doctest(test: str) -> bool:
    """Of Python code: `acme/core.py::acme.core.double`, a module's own is `acme/core.py::acme.core`."""
    name = test.partition("::")[2].partition("[")[0]
    return test_file(test).endswith(".py") and ("." in name or name == PurePosixPath(test_file(test)).stem)


def r2e_name(test: str) -> str:
    """A key of `expected_output_json` without colours and the failure's message."""
    return _COLOUR.sub("", test).split(" - ")[0]


def _published(test: str) -> str:
    """How SWE-bench writes a node id: cut at the first space, a path in its parameter cut to the file's name."""
    name, bracket, option = test.split(" ")[0].partition("[")
    if option.startswith("/") and not option.startswith("//") and "*" not in option and option.endswith("]"):
        option = "/" + option.rsplit("/", 1)[-1]
    return name + bracket + option


def _expected(task: Task) -> dict[str, str]:
    """Raises `ValueError` if the column is something else."""
    statuses = task.extra.get("expected_output_json") or {}
    if isinstance(statuses, str):
        statuses = json.loads(statuses)
    if not isinstance(statuses, dict) or not all(isinstance(status, str) for status in statuses.values()):
        raise ValueError("expected_output_json can't be read")
    return {r2e_name(test): status for test, status in statuses.items()}


def _all_passed(verdicts: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    passed: dict[str, bool] = {}
    for test, verdict in verdicts:
        passed[test] = passed.get(test, True) and verdict
    return passed


def _without(task: Task, part: str) -> str | None:
    return next((test for test in task.fail_to_pass + task.pass_to_pass if part not in test), None)
