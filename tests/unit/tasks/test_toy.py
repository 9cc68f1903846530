"""Toy tasks are what they claim: reproducible, unseen, valid, real git repositories."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import DIFFICULTIES, TOY_IMAGE, generate
from thunder_rollout.tasks.toy.generator import problem_stream
from thunder_rollout.tasks.toy.problem import ToyProblem

pytestmark = pytest.mark.slow


def sh(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def check_out(task: Task, folder: Path) -> Path:
    """The task's repository as a sandbox would hold it, `setup` not yet run."""
    for path, content in task.files.items():
        file = folder / Path(path).relative_to(task.workdir)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def put_hidden_tests(task: Task, folder: Path) -> None:
    for path, text in task.test_files.items():
        (folder / path).write_text(text)


def run_tests(files: dict[str, str], tests: dict[str, str]) -> dict[str, bool]:
    """Every test function by node id, run in this process."""
    outcomes: dict[str, bool] = {}
    for path, text in tests.items():
        first, _, rest = text.partition("\n")
        module = first.split()[1].replace(".", "/") + ".py"
        namespace: dict[str, Any] = {}
        exec(files[module] + rest, namespace)
        for name in [name for name in namespace if name.startswith("test_")]:
            try:
                namespace[name]()
                outcomes[f"{path}::{name}"] = True
            except Exception:
                outcomes[f"{path}::{name}"] = False
    return outcomes


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_same_seed_gives_the_same_tasks_and_more_of_them(difficulty: str) -> None:
    assert generate(7, 5, difficulty) == generate(7, 8, difficulty)[:5]
    assert generate(7, 5, difficulty) != generate(8, 5, difficulty)


def test_tasks_hardly_ever_repeat() -> None:
    statements = [task.problem_statement for seed in range(3) for task in generate(seed, 100)]
    assert len(set(statements)) == len(statements)


@settings(max_examples=40)
@given(seed=st.integers(), difficulty=st.sampled_from(list(DIFFICULTIES)))
def test_wrong_code_fails_what_it_should_and_right_code_passes_all(seed: int, difficulty: str) -> None:
    problem: ToyProblem = next(problem_stream(str(seed), difficulty))
    hidden = problem.test_files(hidden=True)
    failing, passing = problem.test_ids(passing=False), problem.test_ids(passing=True)
    wrong, right = run_tests(problem.files(), hidden), run_tests(problem.files(fixed=True), hidden)
    assert wrong == dict.fromkeys(failing, False) | dict.fromkeys(passing, True)
    assert right == dict.fromkeys(failing + passing, True)
    assert failing and passing
    assert len(problem.bug_sites) == DIFFICULTIES[difficulty].num_bugs


def test_visible_tests_tell_nothing_of_the_bug() -> None:
    for problem in islice(problem_stream("visible", "medium"), 20):
        outcomes = run_tests(problem.files(), problem.test_files(hidden=False))
        assert outcomes == dict.fromkeys(problem.test_ids(passing=True), True)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_base_commit_is_the_one_git_makes(tmp_path: Path, difficulty: str) -> None:
    task = generate(11, 1, difficulty)[0]
    folder = check_out(task, tmp_path)
    (folder / "README.md").chmod(0o755)  # however the files were put there
    made = sh(task.setup.replace(task.workdir, str(folder)), folder)
    assert made.returncode == 0, made.stderr
    assert sh("git rev-parse HEAD", folder).stdout.strip() == task.base_commit
    assert sh("git rev-list --all --count", folder).stdout.strip() == "1"
    assert not sh("git status --porcelain", folder).stdout


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_real_pytest_agrees(tmp_path: Path, difficulty: str) -> None:
    task = generate(13, 1, difficulty)[0]
    folder = check_out(task, tmp_path)
    put_hidden_tests(task, folder)
    before = sh(f"{task.test_command} -rA tests", folder).stdout
    assert all(f"FAILED {test}" in before for test in task.fail_to_pass)
    assert all(f"PASSED {test}" in before for test in task.pass_to_pass)
    (tmp_path / "fix.patch").write_text(task.patch)
    assert sh("git apply fix.patch", folder).returncode == 0
    after = sh(f"{task.test_command} -rA tests", folder)
    assert after.returncode == 0
    assert all(f"PASSED {test}" in after.stdout for test in task.fail_to_pass + task.pass_to_pass)


def test_a_task_says_where_it_runs(toy_task: Task) -> None:
    assert toy_task.image == TOY_IMAGE
    assert all(path.startswith(f"{toy_task.workdir}/") for path in toy_task.files)
    assert not set(toy_task.fail_to_pass) & set(toy_task.pass_to_pass)
