"""Grading, in real local sandboxes where a verdict is at stake and fakes where machinery fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

import pytest

from thunder_rollout.errors import GradingFailed, SandboxFailed, TaskError
from thunder_rollout.sandbox.local import LocalSandbox
from thunder_rollout.sandbox.protocol import ExecResult, Sandbox
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import Grade, GradingConfig, grade
from thunder_rollout.tasks.task import Task

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("local_sandboxes")


def locally(task: Task) -> Callable[[], AbstractAsyncContextManager[Sandbox]]:
    return lambda: started(LocalSandbox(sandbox_spec(task)))


WITH_CONFTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -q -p no:cacheprovider"


async def grade_locally(task: Task, patch: str, test_timeout_s: float = 60.0) -> Grade:
    config = GradingConfig(test_timeout_s=test_timeout_s)
    return await grade(task, patch.encode(), locally(task), config=config)


def source_path(task: Task) -> str:
    return next(line[6:] for line in task.patch.splitlines() if line.startswith("+++ b/"))


def new_file(path: str, text: str) -> str:
    lines = text.splitlines()
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
    return f"{head}@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines)


def removed_file(path: str, text: str) -> str:
    lines = text.splitlines()
    head = f"diff --git a/{path} b/{path}\ndeleted file mode 100644\n--- a/{path}\n+++ /dev/null\n"
    return f"{head}@@ -1,{len(lines)} +0,0 @@\n" + "".join(f"-{line}\n" for line in lines)


def prepended(task: Task, line: str) -> str:
    """A patch that puts `line` first into the file with the bug."""
    path = source_path(task)
    first = task.files[f"{task.workdir}/{path}"].decode().splitlines()[0]
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,1 +1,2 @@\n+{line}\n {first}\n"


async def test_the_reference_patch_is_resolved(toy_task: Task) -> None:
    verdict = await grade_locally(toy_task, toy_task.patch)
    assert verdict.resolved and verdict.reward == 1.0 and not verdict.failed
    assert set(verdict.passed) == {*toy_task.fail_to_pass, *toy_task.pass_to_pass}


async def test_a_patch_without_the_fix_is_not(toy_task: Task) -> None:
    verdict = await grade_locally(toy_task, new_file("notes.txt", "All is well."))
    assert not verdict.resolved and verdict.reward == 0.0
    assert set(verdict.failed) == set(toy_task.fail_to_pass)
    assert set(verdict.passed) == set(toy_task.pass_to_pass)


async def test_one_sandbox_is_enough_for_a_verdict(toy_task: Task) -> None:
    """A second, without the patch, is for what the first shows as altered; pytest alone alters nothing."""
    made = []

    def make_sandbox():
        made.append(LocalSandbox(sandbox_spec(toy_task)))
        return started(made[-1])

    assert (await grade(toy_task, toy_task.patch.encode(), make_sandbox)).resolved
    assert len(made) == 1


HOOKS = (
    "import pytest, {module}\n"
    "@pytest.hookimpl(tryfirst=True)\n"
    "def pytest_collection_modifyitems(items):\n    {line}\n    items.sort(key=lambda item: item.nodeid)\n"
    "def pytest_runtest_setup(item):\n    pass\n"
)


@pytest.mark.parametrize(("line", "sandboxes"), [("pass", 1), ("assert items is not None", 2)])
async def test_what_the_repositorys_own_conftest_files_hook_in_is_theirs(
    toy_task: Task, line: str, sandboxes: int
) -> None:
    """Also in folders that pytest comes to late. Code with pytest's own asserts in it can't be told from the file."""
    module = source_path(toy_task).removesuffix(".py").replace("/", ".")
    conftest = HOOKS.format(line=line, module=module).encode()
    (text,) = toy_task.test_files.values()
    tests = tuple(f"tests/deep/test_it.py::{test.partition('::')[2]}" for test in toy_task.fail_to_pass)
    task = replace(
        toy_task,
        base_commit="HEAD",
        test_command=WITH_CONFTEST,
        files=toy_task.files | {"/testbed/tests/conftest.py": conftest, "/testbed/tests/deep/conftest.py": conftest},
        test_files={"tests/deep/test_it.py": text, "tests/test_all.py": "def test_one(): pass\n"},
        fail_to_pass=tests,
        pass_to_pass=("tests/test_all.py::test_one",),
    )
    made = []

    def make_sandbox():
        made.append(LocalSandbox(sandbox_spec(task)))
        return started(made[-1])

    verdict = await grade(task, task.patch.encode(), make_sandbox)
    assert (verdict.resolved, len(made)) == (True, sandboxes), verdict.log


async def test_a_session_within_the_tested_code_gives_no_verdict(toy_task: Task) -> None:
    """It is imported by a conftest file: before pytest is configured."""
    module = source_path(toy_task).removesuffix(".py").replace("/", ".")
    files = toy_task.files | {"/testbed/tests/conftest.py": f"import {module}\n".encode()}
    task = replace(toy_task, files=files, base_commit="HEAD", test_command=WITH_CONFTEST)
    (path,) = task.test_files
    own = (
        "import os, pytest; __getattr__ = lambda name: None; P = type('P', (), {}); "
        "P.pytest_pyfunc_call = lambda self, pyfuncitem: True; "
        f"os._exit(pytest.main(['--noconftest', '-p', 'thunder_seal', {path!r}], plugins=[P()]))"
    )
    verdict = await grade_locally(task, prepended(task, own))
    assert (verdict.reward, verdict.passed) == (0.0, ())


async def test_an_empty_patch_needs_no_sandbox(toy_task: Task) -> None:
    def refuse() -> AbstractAsyncContextManager[Sandbox]:
        raise AssertionError("no sandbox is needed")

    verdict = await grade(toy_task, b"\n", refuse)
    assert (verdict.reward, verdict.reason) == (0.0, "empty patch")


async def test_a_patch_that_doesnt_apply_is_the_agents_failure(toy_task: Task) -> None:
    verdict = await grade_locally(toy_task, toy_task.patch.replace("return", "yield"))
    assert verdict.reward == 0.0 and "doesn't apply" in verdict.reason


async def test_an_image_whose_plugins_replace_parts_of_pytest_is_graded_all_the_same(toy_task: Task) -> None:
    plugin = b"import _pytest.python as p; run = p.Function.runtest; p.Function.runtest = lambda self: run(self)"
    files = toy_task.files | {"/opt/plugins/image_plugin.py": plugin}
    command = f"PYTHONPATH=$PYTHONPATH:/opt/plugins {toy_task.test_command} -p image_plugin"
    task = replace(toy_task, files=files, test_command=command)
    assert (await grade_locally(task, task.patch)).resolved
    patch = prepended(task, "import _pytest.runner as r; r.check_interactive_exception = lambda *a: False")
    verdict = await grade_locally(task, patch)
    assert verdict.reward == 0.0 and "check_interactive_exception" in verdict.reason


async def test_hanging_tests_are_the_agents_failure(toy_task: Task) -> None:
    verdict = await grade_locally(toy_task, prepended(toy_task, "while True: pass"), test_timeout_s=6.0)
    assert (verdict.reward, verdict.reason) == (0.0, "tests timed out")


async def test_where_the_bug_hangs_the_tests_a_patch_without_the_fix_is_a_failure_all_the_same(toy_task: Task) -> None:
    path = source_path(toy_task)
    hangs = "while True: pass\n" + toy_task.files[f"{toy_task.workdir}/{path}"].decode()
    files = toy_task.files | {f"{toy_task.workdir}/{path}": hangs.encode()}
    first = hangs.splitlines()[1]
    fix = f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,2 +1,1 @@\n-while True: pass\n {first}\n"
    task = replace(toy_task, base_commit="HEAD", files=files, patch=fix)
    verdict = await grade_locally(task, new_file("notes.txt", "All is well."), test_timeout_s=6.0)
    assert (verdict.reward, verdict.reason) == (0.0, "tests timed out")
    unknown = replace(task, patch="")
    with pytest.raises(GradingFailed, match="even without a patch"):
        await grade_locally(unknown, new_file("notes.txt", "All is well."), test_timeout_s=3.0)


async def test_the_hidden_tests_are_the_tasks_whatever_the_patch_says(toy_task: Task) -> None:
    (path,) = toy_task.test_files
    removal = removed_file(path, toy_task.files[f"{toy_task.workdir}/{path}"].decode())
    assert (await grade_locally(toy_task, toy_task.patch + removal)).resolved


async def test_hidden_tests_may_come_as_a_patch(toy_task: Task) -> None:
    path = "tests/test_hidden.py"
    (text,) = toy_task.test_files.values()
    tests = tuple(f"{path}::{test.partition('::')[2]}" for test in toy_task.fail_to_pass)
    task = replace(toy_task, test_files={}, test_patch=new_file(path, text), fail_to_pass=tests)
    assert (await grade_locally(task, task.patch)).resolved
    squatting = task.patch + new_file(path, "def test_nothing(): pass")
    assert (await grade_locally(task, squatting)).resolved


async def test_a_test_patch_that_doesnt_apply_is_no_verdict(toy_task: Task) -> None:
    task = replace(toy_task, test_files={}, test_patch=toy_task.patch.replace("return", "yield"))
    with pytest.raises(GradingFailed, match="test_patch"):
        await grade_locally(task, new_file("notes.txt", "hello"))


async def test_an_image_that_cant_run_tests_is_no_verdict(toy_task: Task) -> None:
    task = replace(toy_task, test_command="python -m no_such_runner")
    with pytest.raises(GradingFailed, match="tests' command leaves no report"):
        await grade_locally(task, task.patch)


async def test_a_bug_that_ends_the_tests_is_no_excuse(toy_task: Task) -> None:
    """With a reference patch it is known that they can report; without one, that their runner begins."""
    path = source_path(toy_task)
    ends = f"import os; os._exit(0)\n{toy_task.files[f'{toy_task.workdir}/{path}'].decode()}"
    task = replace(toy_task, files=toy_task.files | {f"{toy_task.workdir}/{path}": ends.encode()}, base_commit="HEAD")
    verdict = await grade_locally(replace(task, patch=""), new_file("notes.txt", "All is well."))
    assert verdict.reward == 0.0 and "no report" in verdict.reason
    with pytest.raises(GradingFailed, match="even with its reference patch"):
        await grade_locally(replace(task, patch=new_file("x.txt", "x")), new_file("notes.txt", "All is well."))


async def test_a_sandbox_that_dies_once_under_the_tests_is_not_the_patchs_fault(toy_task: Task) -> None:
    made = []

    class Dying(LocalSandbox):
        async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
            if "thunder_seal" in command and len(made) == 1:
                raise SandboxFailed("it is gone")
            return await super().exec(command, timeout_s=timeout_s)

    def make_sandbox():
        made.append(Dying(sandbox_spec(toy_task)))
        return started(made[-1])

    assert (await grade(toy_task, toy_task.patch.encode(), make_sandbox)).resolved


async def test_tests_that_are_no_node_ids_are_refused(toy_task: Task) -> None:
    with pytest.raises(TaskError, match="FAIL_TO_PASS"):
        await grade_locally(replace(toy_task, fail_to_pass=("test_a (app.Tests)",)), toy_task.patch)


@dataclass
class BrokenSandbox:
    """Fails at start, or at the n-th command by dying or by hanging."""

    starts: bool = True
    dies_at: int = 0
    hangs_at: int = 0
    commands: list[str] = field(default_factory=list)
    stopped: bool = False

    async def start(self) -> None:
        if not self.starts:
            raise SandboxFailed("no room")

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        self.commands.append(command)
        if len(self.commands) == self.dies_at:
            raise SandboxFailed("it is gone")
        hangs = len(self.commands) == self.hangs_at
        return ExecResult(exit_code=124 if hangs else 0, output="", timed_out=hangs, took_s=timeout_s)

    async def read_file(self, path: str) -> bytes:
        raise FileNotFoundError(path)

    async def write_file(self, path: str, content: bytes) -> None: ...

    async def diff(self, base_commit: str) -> bytes:
        return b""

    async def clear(self) -> None: ...

    async def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    "sandbox",
    [BrokenSandbox(starts=False), *(BrokenSandbox(dies_at=n) for n in range(1, 5)), BrokenSandbox(hangs_at=2)],
)
async def test_a_broken_sandbox_is_no_verdict(toy_task: Task, sandbox: BrokenSandbox) -> None:
    with pytest.raises(GradingFailed, match=toy_task.instance_id):
        await grade(toy_task, toy_task.patch.encode(), lambda: started(sandbox))
    assert sandbox.stopped
