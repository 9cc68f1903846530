"""How each suite's report reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.report import BadReport
from thunder_rollout.tasks.suites import SUITES, check_gradable, patched_paths
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

DJANGO_LOG = b"""\
Testing against Django installed in '/testbed/django'
test_a (admin.tests.Tests) ... ok
test_b (admin.tests.Tests)
A docstring stands where its status is. ... FAIL
test_c (admin.tests.Tests) ... Internal Server Error: /x/
Traceback (most recent call last):
ok
test_d (admin.tests.Tests) ... skipped 'no database'
test_e (admin.tests.Tests) ... expected failure
test_a (admin.tests.Others) ... ERROR
======================================================================
"""

SYMPY_LOG = b"""\
sympy/core/tests/test_basic.py[4]
test_one ok
test_two F
test_three Timeout ok
test_four ok                                                          [FAIL]
________________________________________________________________________________
test_two ok
"""


def test_django_statuses_are_read_line_by_line() -> None:
    assert SUITES["django"].verdicts(TASK, DJANGO_LOG) == {
        "test_a (admin.tests.Tests)": True,
        "A docstring stands where its status is.": False,
        "test_c (admin.tests.Tests)": True,
        "test_d (admin.tests.Tests)": False,
        "test_e (admin.tests.Tests)": False,
        "test_a (admin.tests.Others)": False,
    }


def test_django_runs_the_modules_of_the_test_patch() -> None:
    command = SUITES["django"].command(replace(TASK, test_command="run"), (), "/s/report.log")
    assert command.startswith("{ run admin.tests\n} > /s/report.log 2>&1")


def test_sympy_statuses_are_read_line_by_line() -> None:
    assert SUITES["sympy"].verdicts(TASK, SYMPY_LOG) == {
        "test_one": True,
        "test_two": False,
        "test_three": True,
        "test_four": True,
    }


def test_a_test_of_r2e_must_have_its_expected_status() -> None:
    summary = (
        "=== short test summary info ===\nPASSED r2e_tests/t.py::T::test_a\nFAILED r2e_tests/t.py::test_b - ok PASSED\n"
    )
    suite = SUITES["r2e"]
    assert suite.verdicts(TASK, summary.encode()) == {"T.test_a": True, "test_b": True}
    assert suite.verdicts(TASK, summary.replace("FAILED", "PASSED").encode()) == {"T.test_a": True, "test_b": False}


@pytest.mark.parametrize("log", ["", "= short test summary info =\n" * 2])
def test_a_log_without_one_summary_is_no_report(log: str) -> None:
    with pytest.raises(BadReport, match="test summaries, not one"):
        SUITES["r2e"].verdicts(TASK, log.encode())


def test_a_node_id_is_found_as_swe_bench_writes_it() -> None:
    passed = {"t.py::test_a[/tmp/x/y.dcm]": True, "t.py::test_b[one two]": True, "t.py::test_b[one three]": False}
    report = json.dumps({"passed": passed, "altered": []}).encode()
    verdicts = SUITES["pytest"].verdicts(TASK, report)
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
