"""Rows of published data sets become tasks that a rollout can run and judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.support.published_rows import (
    BUG,
    F2P,
    FIX,
    P2P,
    PUBLISHED,
    R2E_GYM,
    SWE_BENCH,
    SWE_REBENCH,
    SWE_SMITH,
)
from tests.unit.tasks.test_grading import grade_locally, locally, new_file
from thunder_rollout.errors import TaskError
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import grade
from thunder_rollout.tasks.loaders import load_tasks
from thunder_rollout.tasks.patches import make_patch
from thunder_rollout.tasks.suites import SUITES
from thunder_rollout.tasks.task import Task

IMAGES = {
    "swe_bench": "swebench/sweb.eval.x86_64.acme_1776_acme-7:latest",
    "swe_gym": "xingyaoww/sweb.eval.x86_64.acme_s_acme-7:latest",
    "swe_rebench": "swerebench/sweb.eval.x86_64.acme_1776_acme-7",
    "swe_smith": "jyangballin/swesmith.x86_64.acme_1776_acme.0a1b2c3d:latest",
    "r2e_gym": "namanjain12/acme_final:" + "c" * 40,
}


def load_row(folder: Path, row: dict[str, Any], source: str = "auto") -> Task:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (task,) = load_tasks(path, source=source)
    return task


@pytest.mark.parametrize("source", PUBLISHED)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_data_set_is_told_by_its_columns(tmp_path: Path, source: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    row = PUBLISHED[source]
    if suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (told,), (asked,) = load_tasks(path), load_tasks(path, source=source)
    assert told == asked
    assert told.image == IMAGES[source]
    assert told.workdir == "/testbed"


@pytest.mark.parametrize("source", ["swe_bench", "swe_gym", "swe_rebench", "swe_smith"])
def test_test_names_and_unknown_columns_are_kept(tmp_path: Path, source: str) -> None:
    task = load_row(tmp_path, PUBLISHED[source])
    assert (task.fail_to_pass, task.pass_to_pass) == (tuple(F2P), tuple(P2P))
    assert task.patch == FIX
    assert task.env["PATH"].startswith("/opt/miniconda3/envs/testbed/bin:")
    known = {"instance_id", "repo", "base_commit", "patch", "test_patch", "problem_statement", "version"}
    unknown = set(PUBLISHED[source]) - known - {"FAIL_TO_PASS", "PASS_TO_PASS", "image_name", "docker_image"}
    assert set(task.extra) == unknown


def test_an_image_of_the_rows_own_wins(tmp_path: Path) -> None:
    assert load_row(tmp_path, SWE_BENCH | {"image_name": "mirror/Acme:7"}).image == "mirror/Acme:7"


def test_a_smith_row_is_told_by_its_image_too(tmp_path: Path) -> None:
    row = SWE_SMITH | {"base_commit": "e" * 40, "image_name": "swebench/swesmith.x86_64.acme_1776_acme.0a1b2c3d"}
    task = load_row(tmp_path, row)
    assert (task.base_commit, task.patch, task.image) == ("HEAD", FIX, row["image_name"])


def test_rebench_rows_bring_their_test_command(tmp_path: Path) -> None:
    assert load_row(tmp_path, SWE_REBENCH).test_command == SWE_REBENCH["install_config"]["test_cmd"]


PLAIN_R2E = SWE_BENCH | {"suite": "r2e", "test_command": "t", "image_name": "own:1"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (SWE_REBENCH | {"install_config": {"test_cmd": "nosetests"}}, "only pytest suites"),
        (SWE_BENCH | {"FAIL_TO_PASS": '["test_a (acme.Tests)"]'}, "isn't a pytest node id"),
        (SWE_BENCH | {"repo": "django/django", "test_patch": ""}, "names no test module"),
        (SWE_SMITH | {"patch": "GIT binary patch"}, "can't be reversed"),
        (R2E_GYM | {"expected_output_json": "{}"}, "must map test names"),
        (R2E_GYM | {"expected_output_json": "{"}, "not JSON"),
        (R2E_GYM | {"expected_output_json": {"test_a": 1}}, "must map test names"),
        (PLAIN_R2E | {"expected_output_json": "[1]"}, "mapping of test names"),
        (PLAIN_R2E | {"expected_output_json": {"test_a": 1}}, "can't be read"),
    ],
)
def test_what_cant_be_graded_is_refused_with_its_reason(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        load_row(tmp_path, row)


def test_a_source_that_the_row_isnt_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="expected_output_json is missing, which every row of r2e_gym has"):
        load_row(tmp_path, SWE_BENCH, source="r2e_gym")


@pytest.mark.parametrize(("version", "settings"), [("1.9", False), ("4.2", True)])
def test_django_runs_its_own_runner(tmp_path: Path, version: str, settings: bool) -> None:
    names = json.dumps(["test_a (core.tests.Tests)", "A docstring instead."])
    row = SWE_BENCH | {"repo": "django/django", "version": version, "FAIL_TO_PASS": names, "PASS_TO_PASS": "[]"}
    task = load_row(tmp_path, row)
    assert task.suite == "django"
    assert ("--settings=test_sqlite" in task.test_command) == settings


def at_home(task: Task, files: dict[str, str], setup: str) -> Task:
    """The task in a local sandbox in which `files` stand for its image."""
    contents = {path: text.encode() for path, text in files.items()}
    return replace(task, files=contents | task.files, setup=f"{setup}\n{task.setup}", env={})


COMMIT = "cd /testbed && git init -q && git add -A && git commit -qm upstream && git commit -q --allow-empty -m later"
CODE = "def double(x):\n    return x {} 2\n"
TESTS = "from acme.core import double\ndef test_two(): assert double(2) == 4\ndef test_three(): assert double(3) == 6\n"


@pytest.mark.usefixtures("local_sandboxes")
async def test_a_smith_row_has_its_bug_and_not_its_fix(tmp_path: Path) -> None:
    files = {"/testbed/acme/core.py": CODE.format("*"), "/testbed/tests/test_core.py": TESTS}
    row_task = load_row(tmp_path, SWE_SMITH)
    assert not row_task.self_contained
    task = at_home(row_task, files, COMMIT)
    task = replace(task, test_command="python -m pytest -q -p no:cacheprovider")
    async with started(LocalSandbox(sandbox_spec(task, for_agent=True))) as box:
        look = "cat acme/core.py; ls -A tests /var/tmp; git log --all --oneline | wc -l; git fsck --lost-found"
        seen = (await box.exec(look, timeout_s=30)).output
        assert "x + 2" in seen and "test_core" not in seen and "bug.patch" not in seen
        assert "\n1\n" in seen and "dangling" not in seen
        await box.exec("sed -i 's/x + 2/2 * x/' acme/core.py", timeout_s=30)
        patch = await box.diff("HEAD")
    assert b"2 * x" in patch
    assert (await grade(task, patch, locally(task))).resolved
    assert (await grade_locally(task, task.patch)).resolved
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."))
    assert (set(verdict.failed), set(verdict.passed)) == (set(F2P), set(P2P))


R2E_TESTS = TESTS.replace("def test_two(): assert double(2) == 4", "class TestOld:\n    def test_two(self): pass") + (
    "def test_broken(): assert False\n"
)
R2E_PYTHON = "printf '#!/bin/sh\\nexec python \"$@\"' > .venv/bin/python && chmod +x .venv/bin/python"


def r2e_task(tmp_path: Path) -> Task:
    """A row of R2E-Gym in a local sandbox; FAIL_TO_PASS is one test of three, another one should fail."""
    files = {
        "/testbed/acme/core.py": CODE.format("+"),
        "/testbed/run_tests.sh": ".venv/bin/python -m pytest -rA -p no:cacheprovider r2e_tests\n",
        "/r2e_tests/__init__.py": "",
        "/r2e_tests/test_0.py": "import acme.core\n",
        "/r2e_tests/test_1.py": R2E_TESTS,
    }
    image = "cd /testbed && git init -q && git add acme && git commit -qm upstream"
    return at_home(load_row(tmp_path, R2E_GYM), files, f"{image} && mkdir -p .venv/bin && {R2E_PYTHON}")


@pytest.mark.usefixtures("local_sandboxes")
async def test_an_r2e_row_is_judged_by_its_expected_statuses(tmp_path: Path) -> None:
    task = r2e_task(tmp_path)
    assert task.problem_statement == "**Title:** double(3) is 5"
    async with started(LocalSandbox(sandbox_spec(task, for_agent=True))) as box:
        seen = (await box.exec("ls -A / /testbed; git status --short", timeout_s=30)).output
        assert "r2e_tests" not in seen and "run_tests" not in seen
        await box.exec("sed -i 's/x + 2/x * 2/' acme/core.py; echo 'exit 0' > run_tests.sh", timeout_s=30)
        patch = await box.diff("HEAD")
    verdict = await grade(task, patch, locally(task))
    assert verdict.resolved, verdict.log
    assert set(verdict.passed) == {"test_three", "TestOld.test_two", "test_broken"}
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."))
    assert verdict.failed == ("test_three",)
    assert not (await grade_locally(task, BUG)).resolved


DOCTESTED = 'def double(x):\n    """\n    >>> double(3)\n    6\n    """\n    return x {} 2\n'


@pytest.mark.usefixtures("local_sandboxes")
async def test_a_doctests_file_is_the_agents_to_see_and_to_mend(tmp_path: Path) -> None:
    fixed, broken = ({"acme/core.py": DOCTESTED.format(sign)} for sign in "*+")
    names = ["acme/core.py::core.double", *F2P]
    row = SWE_SMITH | {"patch": make_patch(fixed, broken), "FAIL_TO_PASS": names, "PASS_TO_PASS": []}
    files = {"/testbed/acme/core.py": fixed["acme/core.py"], "/testbed/tests/test_core.py": TESTS}
    task = at_home(load_row(tmp_path, row), files, COMMIT)
    task = replace(task, test_command="python -m pytest -q -p no:cacheprovider --doctest-modules")
    async with started(LocalSandbox(sandbox_spec(task, for_agent=True))) as box:
        seen = (await box.exec("ls acme tests; sed -i 's/x + 2/x * 2/' acme/core.py", timeout_s=30)).output
        assert seen == "acme:\ncore.py\n\ntests:\n"
        patch = await box.diff("HEAD")
    for fix in (patch, task.patch.encode()):
        verdict = await grade(task, fix, locally(task))
        assert verdict.resolved, verdict.log
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."))
    assert set(verdict.failed) == set(names)


def test_expected_statuses_may_be_a_mapping_or_its_json(tmp_path: Path) -> None:
    statuses = json.loads(R2E_GYM["expected_output_json"])
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [
                R2E_GYM | {"expected_output_json": statuses},
                R2E_GYM | {"expected_output_json": {"test_other": "PASSED"}, "commit_hash": "e" * 40},
            ]
        ),
        tmp_path / "rows.parquet",
    )
    mapped, other = load_tasks(tmp_path / "rows.parquet")
    assert mapped == load_row(tmp_path, R2E_GYM)
    assert (other.fail_to_pass, other.pass_to_pass) == (("test_other",), ())
    plain = load_row(tmp_path, PLAIN_R2E | {"expected_output_json": statuses})
    assert SUITES["r2e"].verdicts(plain, b'{"passed": {"t.py::test_three": true}, "skipped": []}') == {
        "test_three": True
    }


def test_a_row_may_be_read_as_its_columns_say(tmp_path: Path) -> None:
    task = load_row(tmp_path, SWE_BENCH | {"image_name": "own:1"}, source="plain")
    assert (task.image, task.env) == ("own:1", {})


RUNNER = """import sys, unittest
sys.path[:0] = ['.', 'tests']
labels = [part for part in sys.argv[1:] if not part.startswith('-') and part not in ('1', '2')]
suite = unittest.defaultTestLoader.loadTestsFromNames(labels)
sys.exit(not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful())
"""
DJANGO_TESTS = """import unittest
from acme.core import double
class Tests(unittest.TestCase):
    def test_two(self):
        print('noise')
        self.assertEqual(double(2), 4)
    def test_three(self):
        '''Three is doubled.'''
        self.assertEqual(double(3), {})
"""


@pytest.mark.usefixtures("local_sandboxes")
async def test_a_django_row_is_judged_by_its_runner(tmp_path: Path) -> None:
    hidden = (
        "diff --git a/tests/app/tests.py b/tests/app/tests.py\n--- a/tests/app/tests.py\n+++ b/tests/app/tests.py\n"
    )
    hidden += "@@ -8,2 +8,2 @@\n         '''Three is doubled.'''\n"
    hidden += "-        self.assertEqual(double(3), 5)\n+        self.assertEqual(double(3), 6)\n"
    names = {"FAIL_TO_PASS": '["Three is doubled."]', "PASS_TO_PASS": '["test_two (app.tests.Tests.test_two)"]'}
    files = {
        "/testbed/acme/core.py": CODE.format("+"),
        "/testbed/tests/runtests.py": f"#!/usr/bin/env python\n{RUNNER}",
        "/testbed/tests/app/__init__.py": "",
        "/testbed/tests/app/tests.py": DJANGO_TESTS.format(5),
    }
    row = load_row(tmp_path, SWE_BENCH | {"repo": "django/django", "test_patch": hidden} | names)
    task = replace(at_home(row, files, COMMIT), base_commit="HEAD")
    verdict = await grade_locally(task, task.patch)
    assert verdict.resolved, verdict.log
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."))
    assert (verdict.failed, verdict.passed) == (("Three is doubled.",), ("test_two (app.tests.Tests.test_two)",))
    broken = await grade_locally(task, task.patch.replace("+    return x * 2", "+    return x *"))
    assert broken.reward == 0.0 and broken.reason == "the tests left no report: no report was written"
