"""How each suite runs and its record reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.patches import patched_paths
from thunder_rollout.tasks.suites import SUITES, check_gradable
from thunder_rollout.tasks.task import Task

TEST_PATCH = "--- a/tests/admin/tests.py\n+++ b/tests/admin/tests.py\n--- /dev/null\n+++ b/tests/admin/data.json\n"
TASK = Task(
    instance_id="t",
    repo="r",
    base_commit="c",
    problem_statement="p",
    image="i",
    fail_to_pass=("test_a (admin.tests.Tests)",),
    test_patch=TEST_PATCH,
    extra={"expected_output_json": json.dumps({"T.test_a": "PASSED", "test_b - boom": "FAILED"})},
)


def record_of(passed: dict[str, bool], skipped: tuple[str, ...] = ()) -> bytes:
    return json.dumps({"passed": passed, "skipped": skipped, "altered": []}).encode()


def test_django_runs_the_modules_of_the_test_patch() -> None:
    assert SUITES["django"].command(replace(TASK, test_command="run"), ()) == "run admin.tests"


def test_sympy_runs_the_files_of_the_test_patch_in_one_process() -> None:
    command = SUITES["sympy"].command(replace(TASK, test_command="bin/test"), ())
    assert re.fullmatch(r"export PYTHONHASHSEED=\d+\nbin/test tests/admin/tests.py", command)


def test_a_test_of_r2e_must_have_its_expected_status() -> None:
    suite, t = SUITES["r2e"], "r2e_tests/t.py::"
    assert suite.verdicts(TASK, record_of({f"{t}T::test_a": True, f"{t}test_b": False})) == {
        "T.test_a": True,
        "test_b": True,
    }
    assert suite.verdicts(TASK, record_of({f"{t}T::test_a": False, f"{t}test_b": True})) == {
        "T.test_a": False,
        "test_b": False,
    }
    skipped = record_of({f"{t}test_b": False}, (f"{t}test_b",))
    assert suite.verdicts(TASK, skipped) == {}, "to be skipped is not to fail"


def test_a_node_id_is_found_as_swe_bench_writes_it() -> None:
    passed = {"t.py::test_a[/tmp/x/y.dcm]": True, "t.py::test_b[one two]": True, "t.py::test_b[one three]": False}
    verdicts = SUITES["pytest"].verdicts(TASK, record_of(passed))
    assert verdicts["t.py::test_a[/y.dcm]"] and verdicts["t.py::test_a[/tmp/x/y.dcm]"]
    assert verdicts["t.py::test_b[one two]"] and not verdicts["t.py::test_b[one"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (replace(TASK, suite="nose"), "must be one of pytest, django, sympy, r2e"),
        (TASK, "isn't a pytest node id"),
        (replace(TASK, suite="sympy", test_patch=""), "names no test file"),
        (replace(TASK, suite="django", test_patch=""), "names no test module"),
        (replace(TASK, suite="r2e", extra={}), "expected_output_json is missing"),
    ],
)
def test_what_cant_be_judged_is_refused(task: Task, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        check_gradable(task)


def test_a_patch_names_each_file_once() -> None:
    assert patched_paths(TEST_PATCH) == ["tests/admin/tests.py", "tests/admin/data.json"]
