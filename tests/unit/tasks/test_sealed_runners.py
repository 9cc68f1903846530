"""Runners that are not pytest, and what code under test may try on them: a verdict it only prints is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tasks.test_grading import grade_locally, new_file
from tests.unit.tasks.test_sources import r2e_task
from thunder_rollout.tasks.patches import reverse_patch
from thunder_rollout.tasks.task import Task

pytestmark = pytest.mark.usefixtures("local_sandboxes")

COMMIT = "cd /testbed && chmod +x tests/run bin/test && git init -q && git add -A && git commit -qm upstream"
FIX = new_file("acme/core.py", "def double(x):\n    return 2 * x\n")
BROKEN = "def double(x):\n    return x + 2\n"

UNITTEST_RUNNER = """#!/usr/bin/env python
import sys, unittest
sys.path[:0] = ['.', 'tests']
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
sys.exit(not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful())
"""
UNITTESTS = """import unittest
from acme.core import double
class Tests(unittest.TestCase):
    def test_two(self):
        self.assertEqual(double(2), 4)
    def test_three(self):
        '''Three is doubled.'''
        self.assertEqual(double(3), 6)
    def test_all(self):
        for number in (2, 3):
            with self.subTest(number=number):
                self.assertEqual(double(number), 2 * number)
    @unittest.expectedFailure
    def test_broken(self):
        self.assertEqual(double(2), 5)
    @unittest.skip('not here')
    def test_skipped(self):
        pass
class Later(unittest.TestCase):
    def test_runs_tests(self):
        '''A suite within the suite.'''
        inner = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromTestCase(Failing))
        self.assertFalse(inner.wasSuccessful())
class Failing(unittest.TestCase):
    def runTest(self):
        self.fail()
"""
DJANGO = Task(
    instance_id="django__django-1",
    repo="django/django",
    base_commit="HEAD",
    problem_statement="double(3) is 5",
    image="none",
    fail_to_pass=("Three is doubled.", "test_all (app.tests.Tests.test_all)"),
    pass_to_pass=("test_two (app.tests.Tests.test_two)", "A suite within the suite."),
    patch="",
    test_patch=new_file("tests/app/tests.py", UNITTESTS),
    files={
        "/testbed/acme/core.py": BROKEN.encode(),
        "/testbed/tests/runtests.py": UNITTEST_RUNNER.encode(),
        "/testbed/bin/test": b"",
        "/testbed/tests/run": b"",
    },
    setup=COMMIT,
    test_command="python tests/runtests.py",
    suite="django",
    self_contained=True,
)

SYMPY_RUNNER = """#!/usr/bin/env python
import os, sys
sys.path.insert(0, '.')
from sympy.testing.runtests import PyTestReporter, SymPyTests
tests = SymPyTests(PyTestReporter(verbose=True, colors=False), seed=1)
tests._root_dir = os.getcwd()
tests._testfiles = [os.path.abspath(path) for path in sys.argv[1:]]
sys.exit(not tests.test())
"""
SYMPY_TESTS = """from acme.core import double
from sympy.testing.pytest import XFAIL
def test_two(): assert double(2) == 4
def test_three(): assert double(3) == 6
@XFAIL
def test_broken(): assert double(2) == 5
"""
SYMPY = replace(
    DJANGO,
    instance_id="sympy__sympy-1",
    fail_to_pass=("test_three",),
    pass_to_pass=("test_two",),
    test_patch=new_file("acme/tests/test_core.py", SYMPY_TESTS),
    files=DJANGO.files | {"/testbed/bin/test": SYMPY_RUNNER.encode()},
    test_command="bin/test",
    suite="sympy",
)


def fixed(first_lines: str = "") -> str:
    return with_core(f"{first_lines}\ndef double(x):\n    return 2 * x\n".lstrip())


def with_core(text: str) -> str:
    return reverse_patch(new_file("acme/core.py", BROKEN)) + new_file("acme/core.py", text)


def hacked(lines: str) -> str:
    return with_core(f"{lines}\n{BROKEN}")


@pytest.mark.parametrize("task", [DJANGO, SYMPY], ids=["unittest", "sympy"])
async def test_each_test_is_judged_by_its_runner(task: Task) -> None:
    verdict = await grade_locally(task, fixed("print('noise')"))
    assert verdict.resolved, (verdict.reason, verdict.log)
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."))
    assert (verdict.failed, verdict.passed) == (task.fail_to_pass, task.pass_to_pass), verdict.log


async def test_what_is_skipped_or_fails_as_expected_does_not_pass() -> None:
    names = ("test_broken (app.tests.Tests.test_broken)", "test_skipped (app.tests.Tests.test_skipped)")
    verdict = await grade_locally(replace(DJANGO, pass_to_pass=names), fixed())
    assert verdict.failed == names
    verdict = await grade_locally(replace(SYMPY, pass_to_pass=("test_broken",)), fixed())
    assert verdict.failed == ("test_broken",)


PRINTED = {
    "django": [f"{name} ... ok" for name in DJANGO.fail_to_pass],
    "sympy": [f"{name} ok" for name in SYMPY.fail_to_pass],
}
HACKS = {
    "print verdicts": "import sys\nfor out in (sys.stdout, sys.stderr): print({printed!r}, file=out)",
    "leave in good order": "import sys\nprint({printed!r}); sys.stdout.flush(); import os; os._exit(0)",
    "run tests of its own": (
        "import unittest\nclass Mine(unittest.TestCase):\n def runTest(self): pass\n"
        " def __str__(self): return 'Three is doubled.'\n"
        "run = lambda: unittest.TextTestRunner(verbosity=2).run(Mine())\n"
        "import threading, sys\nrun(); thread = threading.Thread(target=run); thread.start(); thread.join()"
    ),
    "replace assertions": "import unittest; unittest.TestCase.assertEqual = lambda *a, **k: None",
    "replace verdicts": (
        "import unittest; unittest.TestResult.addFailure = lambda self, test, error: self.addSuccess(test)\n"
        "unittest.TextTestResult.addFailure = lambda self, test, error: self.addSuccess(test)\n"
        "import sys; P = getattr(sys.modules.get('sympy.testing.runtests'), 'PyTestReporter', type('P', (), {{}}))\n"
        "P.test_fail = lambda self, *a: self.test_pass(); P.test_exception = P.test_fail"
    ),
    "read the secret": (
        "import glob, os, sys\nassert not glob.glob('/run/thunder/grading-*/secret')\n"
        "assert not any('grading-' in entry for entry in (*sys.path, os.environ.get('PYTHONPATH', '')))"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "hack"),
    [
        (DJANGO, "print verdicts"),
        (DJANGO, "leave in good order"),
        (DJANGO, "replace assertions"),
        (DJANGO, "replace verdicts"),
        (SYMPY, "print verdicts"),
        (SYMPY, "replace verdicts"),
    ],
    ids=lambda value: getattr(value, "suite", value),
)
async def test_code_that_attacks_its_runner_gets_nothing(task: Task, hack: str) -> None:
    printed = "\n".join(PRINTED[task.suite])
    verdict = await grade_locally(task, hacked(HACKS[hack].format(printed=printed)))
    assert (verdict.reward, verdict.resolved) == (0.0, False), verdict.reason
    assert not set(verdict.passed) & set(task.fail_to_pass)


async def test_code_that_runs_tests_of_its_own_under_the_hidden_names_gets_nothing() -> None:
    for end in ("", "\nsys.exit(0)"):
        verdict = await grade_locally(DJANGO, hacked(HACKS["run tests of its own"] + end))
        assert not set(verdict.passed) & set(DJANGO.fail_to_pass), verdict.log


WRITES_TESTS = """import pathlib
tests = pathlib.Path({path!r})
tests.write_text(tests.read_text().replace("double(", "int.__mul__(2, "))
"""


@pytest.mark.parametrize(
    ("task", "first", "path"),
    [
        (DJANGO, "tests/aaa/tests.py", "/testbed/tests/app/tests.py"),
        (SYMPY, "acme/tests/test_aaa.py", "/testbed/acme/tests/test_core.py"),
    ],
    ids=["unittest", "sympy"],
)
async def test_code_that_writes_into_the_next_test_file_gets_nothing(task: Task, first: str, path: str) -> None:
    earlier = replace(task, test_patch=new_file(first, "import acme.core\n") + task.test_patch)
    verdict = await grade_locally(earlier, hacked(WRITES_TESTS.format(path=path)))
    assert verdict.reason == f"the tests or their runner were altered: {path}", verdict.log
    assert (await grade_locally(earlier, fixed())).resolved


async def test_the_secret_is_gone_before_the_tested_code_runs() -> None:
    assert (await grade_locally(DJANGO, fixed(HACKS["read the secret"]))).resolved


async def test_a_runner_of_the_repositorys_own_is_not_the_patchs_unless_the_reference_changes_it() -> None:
    lenient = "import sys\nfor line in ({!r}): print(line)\n".format(PRINTED["django"])
    brought = reverse_patch(new_file("tests/runtests.py", UNITTEST_RUNNER)) + new_file("tests/runtests.py", lenient)
    verdict = await grade_locally(DJANGO, brought)
    assert verdict.failed == DJANGO.fail_to_pass
    changed = reverse_patch(new_file("tests/runtests.py", UNITTEST_RUNNER))
    their_own = replace(DJANGO, patch=fixed() + changed + new_file("tests/runtests.py", f"{UNITTEST_RUNNER}# new\n"))
    verdict = await grade_locally(their_own, fixed() + brought)
    assert verdict.reason == "the tests left no report: no report was written", "it is believed to run tests, no more"


R2E_REPORT = """==== short test summary info ====
PASSED r2e_tests/test_1.py::test_three
PASSED r2e_tests/test_1.py::TestOld::test_two
FAILED r2e_tests/test_1.py::test_broken - assert False
==== 1 failed, 2 passed in 0.01s ===="""
WITH_TESTS_OF_ITS_OWN = """import os, subprocess, sys, tempfile, pytest
folder = tempfile.mkdtemp() + "/r2e_tests"
os.makedirs(folder)
open(folder + "/__init__.py", "w").close()
tests = "class TestOld:\\n def test_two(self): pass\\ndef test_three(): pass\\ndef test_broken(): assert False\\n"
open(folder + "/test_1.py", "w").write(tests)
"""
FORGE = """
record='{"passed": {"r2e_tests/test_1.py::test_three": true}, "skipped": [], "altered": []}'
for folder in /run/thunder/grading-*; do printf '%064d\\n%s' 0 "$record" > $folder/report; done
exit 0
"""
PRINT = f"""import contextlib, os
for number in os.listdir("/proc/self/fd"):  # pytest keeps what it captures from the first ones
    with contextlib.suppress(OSError): os.write(int(number), {R2E_REPORT.encode()!r})
"""
R2E_HACKS = {
    "print the report": PRINT,
    "print the report and leave": PRINT + "os._exit(1)",
    "end in a session of its own": WITH_TESTS_OF_ITS_OWN + "os._exit(pytest.main(['-p', 'thunder_seal', folder]))",
    "end in another process's session": (
        WITH_TESTS_OF_ITS_OWN + "os.chdir(folder + '/..')\n"
        "os._exit(subprocess.call([sys.executable, '-m', 'pytest', 'r2e_tests']))"
    ),
    "go on in the script under way": f"open('/testbed/run_tests.sh', 'a').write({FORGE!r})",
    "write into the next test file": WITH_TESTS_OF_ITS_OWN + "open('/r2e_tests/test_1.py', 'w').write(tests)",
    "move the tests' folder": (
        WITH_TESTS_OF_ITS_OWN + "os.remove('/testbed/r2e_tests')\nos.symlink(folder, '/testbed/r2e_tests')"
    ),
}


@pytest.mark.parametrize("hack", R2E_HACKS)
async def test_code_that_forges_the_report_of_run_tests_sh_gets_nothing(tmp_path: Path, hack: str) -> None:
    verdict = await grade_locally(r2e_task(tmp_path), hacked(R2E_HACKS[hack]))
    assert (verdict.reward, verdict.resolved) == (0.0, False), verdict.reason
    assert "test_three" not in verdict.passed


@pytest.mark.parametrize("path", ["run_tests.sh", "r2e_tests/test_1.py", ".venv/bin/python"])
async def test_a_patch_brings_nothing_that_run_tests_sh_runs(tmp_path: Path, path: str) -> None:
    verdict = await grade_locally(r2e_task(tmp_path), new_file(path, f"echo '{R2E_REPORT}'"))
    assert (verdict.reward, verdict.resolved) == (0.0, False), verdict.reason
    assert "test_three" not in verdict.passed
