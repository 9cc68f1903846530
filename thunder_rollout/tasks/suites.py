"""The kinds of test suite that can be graded: how each runs and how its verdicts read.

| suite | names | verdicts come from |
|---|---|---|
| `pytest` | node ids, `path::Class::name` | a sealed record (see `seal`), which no print can forge |
| `django` | `name (module.Class)`, or a test's docstring | the verbose log of `tests/runtests.py` |
| `sympy` | bare function names | the verbose log of `bin/test` |
| `r2e` | `Class.name`; each has the status it should have | the short test summary of `run_tests.sh` |

A log is text: tested code that prints like the runner can forge a verdict in the last three, as in
the data sets' own harnesses. A name that appears twice passes only if it passed each time.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.report import BadReport
from thunder_rollout.tasks.seal import PLUGIN, passed_in_record
from thunder_rollout.tasks.task import Task

_NOT_TESTS = (".cfg", ".csv", ".gif", ".ini", ".jpeg", ".jpg", ".json", ".md", ".pkl", ".png", ".rst", ".toml", ".txt",
              ".yaml", ".yml")  # fmt: skip
_LOG_TAIL_BYTES = 12_000
_STATUS = r"(ok|FAIL|ERROR|skipped\b.*|expected failure|unexpected success)$"
_UNITTEST_STATUS = re.compile(rf" \.\.\. +{_STATUS}", re.IGNORECASE)
_BARE_STATUS = re.compile(_STATUS, re.IGNORECASE)
_SYMPY_LINE = re.compile(r"(test_\w+) (?:.* )?(ok|F|E|f|X|s|w)(?: +\[\w+\])?$")
_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m|\r")


class Suite(Protocol):
    @property
    def report(self) -> str:
        """Its file name in the grader's scratch folder."""

    @property
    def sealed(self) -> bool:
        """Whether the report is a sealed record, which takes the grader's plugin; else a log."""

    def refusal(self, task: Task) -> str:
        """Why the task's tests can't be judged; "" if they can."""

    def command(self, task: Task, tests: Iterable[str], report: str) -> str:
        """Runs at least `tests` and leaves a report at `report`; its output is for the log."""

    def probe(self, task: Task) -> str:
        """Succeeds where the image can run tests at all, whatever the agent's patch did."""

    def verdicts(self, task: Task, report: bytes) -> dict[str, bool]:
        """Whether, by the log or the unsealed record, each test that ran did what it should. Raises `BadReport`."""


@dataclass(frozen=True, slots=True)
class _Pytest:
    report: str = "report"
    sealed: bool = True

    def refusal(self, task: Task) -> str:
        return "" if (odd := _without(task, "::")) is None else f"{odd!r} isn't a pytest node id (path::test)"

    def command(self, task: Task, tests: Iterable[str], report: str) -> str:
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return f"{task.test_command} -p {PLUGIN} {shlex.join(files)}"

    def probe(self, task: Task) -> str:
        return f"cd / && {task.test_command} -p {PLUGIN} --version"

    def verdicts(self, task: Task, report: bytes) -> dict[str, bool]:
        exact = passed_in_record(report)
        return _all_passed([*((_published(test), passed) for test, passed in exact.items())]) | exact


@dataclass(frozen=True, slots=True)
class _Django:
    report: str = "report.log"
    sealed: bool = False

    def refusal(self, task: Task) -> str:
        return "" if self._labels(task) else "its test_patch names no test module to run"

    def command(self, task: Task, tests: Iterable[str], report: str) -> str:
        return _logged(f"{task.test_command} {shlex.join(self._labels(task))}", report)

    def probe(self, task: Task) -> str:
        return "python --version"

    def verdicts(self, task: Task, report: bytes) -> dict[str, bool]:
        return _all_passed(_unittest_lines(_text(report)))

    @staticmethod
    def _labels(task: Task) -> list[str]:
        paths = [path for path in patched_paths(task.test_patch) if path.endswith(".py")]
        return [path.removesuffix(".py").removeprefix("tests/").replace("/", ".") for path in paths]


@dataclass(frozen=True, slots=True)
class _Sympy:
    report: str = "report.log"
    sealed: bool = False

    def refusal(self, task: Task) -> str:
        return "" if self._files(task) else "its test_patch names no test file to run"

    def command(self, task: Task, tests: Iterable[str], report: str) -> str:
        return _logged(f"{task.test_command} {shlex.join(self._files(task))}", report)

    def probe(self, task: Task) -> str:
        return "python --version"

    def verdicts(self, task: Task, report: bytes) -> dict[str, bool]:
        matches = (_SYMPY_LINE.match(line.strip()) for line in _text(report).splitlines())
        return _all_passed((match[1], match[2] == "ok") for match in matches if match)

    @staticmethod
    def _files(task: Task) -> list[str]:
        return [path for path in patched_paths(task.test_patch) if not path.endswith(_NOT_TESTS)]


@dataclass(frozen=True, slots=True)
class _R2e:
    """The task's names are the keys of `expected_output_json`; failing may be what a test should do."""

    report: str = "report.log"
    sealed: bool = False

    def refusal(self, task: Task) -> str:
        return "" if _expected(task) else "expected_output_json is missing"

    def command(self, task: Task, tests: Iterable[str], report: str) -> str:
        return _logged(task.test_command, report)

    def probe(self, task: Task) -> str:
        return ".venv/bin/python --version"

    def verdicts(self, task: Task, report: bytes) -> dict[str, bool]:
        expected = _expected(task)
        return _all_passed((test, status == expected.get(test)) for test, status in _summary_lines(_text(report)))


SUITES: dict[str, Suite] = {"pytest": _Pytest(), "django": _Django(), "sympy": _Sympy(), "r2e": _R2e()}


def check_gradable(task: Task) -> None:
    """Raises `TaskError` that says why nobody could judge the task's tests."""
    suite = SUITES.get(task.suite)
    if suite is None:
        raise TaskError(f"task {task.instance_id}: suite={task.suite!r}: must be one of {', '.join(SUITES)}")
    if refusal := suite.refusal(task):
        raise TaskError(f"task {task.instance_id}: FAIL_TO_PASS and PASS_TO_PASS can't be judged: {refusal}")


def r2e_name(test: str) -> str:
    """A key of `expected_output_json` without colours and the failure's message."""
    return _COLOUR.sub("", test).split(" - ")[0]


def patched_paths(patch: str) -> list[str]:
    """The files that a git patch writes or removes."""
    paths = [line[6:].split("\t")[0] for line in patch.splitlines() if line.startswith(("--- a/", "+++ b/"))]
    return list(dict.fromkeys(paths))


def _published(test: str) -> str:
    """How SWE-bench writes a node id: cut at the first space, a path in its parameter cut to the file's name."""
    name, bracket, option = test.split(" ")[0].partition("[")
    if option.startswith("/") and not option.startswith("//") and "*" not in option and option.endswith("]"):
        option = "/" + option.rsplit("/", 1)[-1]
    return name + bracket + option


def _unittest_lines(log: str) -> Iterator[tuple[str, bool]]:
    """A status may follow its test's name on a later line, where the test has printed something."""
    pending = ""
    for raw in log.splitlines():
        line = raw.strip()
        if match := _UNITTEST_STATUS.search(line):
            yield line[: match.start()], match[1].lower() == "ok"
            pending = ""
        elif pending and (match := _BARE_STATUS.search(line)):
            yield pending, match[1].lower() == "ok"
            pending = ""
        elif " ... " in line or line.endswith(" ..."):
            pending = line.partition(" ...")[0]


def _summary_lines(log: str) -> Iterator[tuple[str, str]]:
    sections = _SUMMARY.split(_COLOUR.sub("", log))
    if len(sections) != 2:
        raise BadReport(f"the log has {len(sections) - 1} test summaries, not one")
    for line in sections[1].splitlines():
        status, _, test = line.partition(" ")
        if status in ("PASSED", "FAILED", "ERROR") and "::" in test:
            yield ".".join(r2e_name(test).split("::")[1:]), status


def _expected(task: Task) -> dict[str, str]:
    statuses = json.loads(task.extra.get("expected_output_json") or "{}")
    return {r2e_name(test): status for test, status in statuses.items()}


def _all_passed(verdicts: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    passed: dict[str, bool] = {}
    for test, verdict in verdicts:
        passed[test] = passed.get(test, True) and verdict
    return passed


def _logged(command: str, report: str) -> str:
    return f"{{ {command}\n}} > {report} 2>&1; code=$?; tail -c {_LOG_TAIL_BYTES} {report}; exit $code"


def _text(report: bytes) -> str:
    return report.decode("utf-8", "replace")


def _without(task: Task, part: str) -> str | None:
    return next((test for test in task.fail_to_pass + task.pass_to_pass if part not in test), None)
