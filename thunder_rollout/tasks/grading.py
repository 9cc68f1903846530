"""The verdict on an agent's patch: hidden tests in a fresh sandbox.

Whatever the patch does wrong (doesn't apply, breaks the tests, makes them hang or end without a record) is the
agent's failure, a reward of 0 with its reason. Whatever keeps the grader from a verdict (the sandbox
can't start or dies, the image can't run tests, the hidden tests don't go in, or the tests run out
of time even with the reference patch) is `GradingFailed`, never a reward. Which of the two it is never depends on
a sandbox that has the patch: where that gives no record, the tests run again in a fresh one with the reference
patch, and a sandbox that fails has to fail twice before the patch is blamed.

The patch decides nothing about how it is judged: what it says about the hidden tests' files,
the runner and its configuration and plugins, or Python's start-up is left out when it is applied (see
`patch_rules`, `suites`). The tested code shares a process with its judge, so verdicts come from a record
that only a normal end of the run seals (see `seal_plugin`): leaving early, printing or writing a report,
leaving a process behind, writing into the tests' files before the runner reads them, replacing the runner's
functions and classes or a test's methods, bringing pytest hooks or taking away its own, and giving reports in
its name all end in reward 0.

What no runner in the same process can keep out, and this one doesn't: code written against this very
plugin that digs the secret out of the interpreter's memory, edits the plugin's objects or undoes its changes
before the end; code that gives other single objects of the runner methods or data of their own; and code that
fools the tests' own assertions (an object that equals everything) or puts other tests or fixtures in their
place in memory or in Python's caches. Where the reference patch changes a runner that is the repository's
own (Django's, sympy's), the agent's may change it too.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from thunder_rollout.errors import ConfigError, GradingFailed, SandboxFailed
from thunder_rollout.sandbox.gitdiff import SCRATCH
from thunder_rollout.sandbox.protocol import ExecResult, Sandbox
from thunder_rollout.tasks.patch_rules import exclude_arguments, judge_patterns, moved_judges
from thunder_rollout.tasks.patches import patched_paths
from thunder_rollout.tasks.report import BadReport
from thunder_rollout.tasks.seal import PLUGIN_SOURCE, unseal
from thunder_rollout.tasks.suites import SUITES, Suite, check_gradable, test_file
from thunder_rollout.tasks.task import Task

MakeSandbox = Callable[[], AbstractAsyncContextManager[Sandbox]]

_GIT = "git -c safe.directory='*' -c core.hooksPath=/dev/null"
_TIMED_OUT = "tests timed out"
_PYTHON_PATH = re.compile(r"\bPYTHONPATH=(\S+)")
_TELL_PATH = "import os, sys; print(*map(os.path.relpath, map(os.path.realpath, sys.path)), sep='\\n')"
_MAX_REPORT_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingConfig:
    test_timeout_s: float = 300.0  # beyond it the tests count as failed by the patch
    step_timeout_s: float = 60.0  # each of the grader's own commands; beyond it grading failed
    log_bytes: int = 1024**2  # of the tests' output; beyond it the log is cut in its middle

    def __post_init__(self) -> None:
        for name in ("test_timeout_s", "step_timeout_s", "log_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"grading.{name}={getattr(self, name)!r}: must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """`passed` and `failed` are the task's FAIL_TO_PASS and PASS_TO_PASS tests; both are empty
    where no test ran. `reason` says in a few words why; `log` is the tests' output, as much of it as the
    sandbox's `limits.output_bytes` let through."""

    resolved: bool
    reward: float
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    log: str = ""
    reason: str = ""


async def grade(task: Task, patch: bytes, make_sandbox: MakeSandbox, *, config: GradingConfig | None = None) -> Grade:
    """Judge `patch` (a binary git diff against `base_commit`).

    `make_sandbox` gives one fresh sandbox, started and stopped by its context (see
    `environment`); an empty patch needs none. Raises `GradingFailed`, and `TaskError` for a task
    that nobody could grade.
    """
    check_gradable(task)
    if not patch.strip():
        return _failed("empty patch")
    config = config or GradingConfig()
    try:
        grading, verdict = await _judge(task, patch, make_sandbox, config)
        if not grading.in_doubt and not grading.altered:
            return verdict
        baseline = await _run_baseline(task, make_sandbox, config)
    except SandboxFailed as error:
        raise GradingFailed(f"task {task.instance_id}: the grading sandbox failed: {error}") from error
    if baseline.trouble:
        how = "with its reference patch" if task.patch else "without a patch"
        raise GradingFailed(f"task {task.instance_id}: even {how} {baseline.trouble}")
    if by_patch := grading.altered - baseline.altered:
        altered = ", ".join(sorted(by_patch))[:500]
        return _failed(f"the tests or their runner were altered: {altered}", log=verdict.log)
    return verdict


async def _judge(task: Task, patch: bytes, make_sandbox: MakeSandbox, config: GradingConfig) -> tuple[_Grading, Grade]:
    for _ in range(2):
        async with make_sandbox() as sandbox:
            grading = _Grading(task, sandbox, config)
            try:
                return grading, await grading.judge(patch)
            except SandboxFailed as error:
                if not grading.in_doubt:
                    raise
                trouble = str(error)
    return grading, _failed(f"its sandbox fails with the patch: {trouble}")


@dataclass(slots=True)
class _Grading:
    """One verdict in one started sandbox; `altered` is what the run replaced of its own runner. It is `in_doubt`
    from when the patch is in until there is a record: the patch or the machinery may be why there is none."""

    task: Task
    sandbox: Sandbox
    config: GradingConfig
    altered: frozenset[str] = frozenset()
    in_doubt: bool = False
    scratch: str = field(default_factory=lambda: f"{SCRATCH}/grading-{secrets.token_hex(8)}")
    secret: bytes = field(default_factory=lambda: secrets.token_hex(32).encode())

    @property
    def suite(self) -> Suite:
        return SUITES[self.task.suite]

    async def judge(self, patch: bytes) -> Grade:
        await self.prepare()
        patterns = await self._judge_patterns()
        if moved := moved_judges(patch, patterns):
            return _failed(f"the patch doesn't apply: it moves {moved[0]}")
        self.in_doubt = True
        if trouble := await self._apply_agent_patch(patch, exclude_arguments(patterns)):
            self.in_doubt = False
            return _failed(f"the patch doesn't apply: {trouble}", log=trouble)
        if trouble := await self.put_hidden_tests():
            return _failed(f"the patch is in the hidden tests' way: {trouble}", log=trouble)
        result = await self.run_tests()
        if result.timed_out:
            return _failed(_TIMED_OUT, log=result.output)
        await self.sandbox.clear()
        try:
            verdicts = self.suite.verdicts(self.task, await self.report())
        except (BadReport, FileNotFoundError) as error:
            return _failed(f"the tests left no report: {error}", log=result.output)
        self.in_doubt = False
        return self._verdict(verdicts, result.output)

    async def prepare(self) -> None:
        await self._must(f"mkdir -p {self.scratch}", "make room for the grader's files")

    async def _judge_patterns(self) -> list[str]:
        folders = await self._import_folders()
        inside = shlex.join(f"{folder}/" for folder in folders)
        names = await self._must(
            f"git -c core.quotePath=false ls-tree --name-only HEAD {inside}", "list the repository"
        )
        return judge_patterns(
            judged_paths=self._hidden_paths(), import_folders=folders, base_paths=names.output.splitlines()
        )

    async def _apply_agent_patch(self, patch: bytes, exclude: str) -> str:
        """What git says against the patch, "" if it applied."""
        file = f"{self.scratch}/agent.patch"
        await self.sandbox.write_file(file, patch)
        result = await self._step(f"{_GIT} apply --whitespace=nowarn {exclude} {file}", "apply the agent's patch")
        return _last_line(result) if result.exit_code else ""

    async def _import_folders(self) -> list[str]:
        """The folders of the repository that Python searches for modules, relative; the top, ".", is first."""
        set_for_tests = ":".join(_PYTHON_PATH.findall(self.task.test_command))
        script = f"export PYTHONPATH=$PYTHONPATH:{set_for_tests}\npython -c {shlex.quote(_TELL_PATH)}"
        told = await self._step(script, "tell where Python finds modules")
        folders = told.output.splitlines() if not told.exit_code else []
        return list(dict.fromkeys([".", *(folder for folder in folders if folder.partition("/")[0] != "..")]))

    async def put_reference_patch(self) -> None:
        if self.task.patch:
            file = f"{self.scratch}/reference.patch"
            await self.sandbox.write_file(file, self.task.patch.encode())
            await self._must(f"{_GIT} apply --whitespace=nowarn {file}", "apply the reference patch")

    async def put_hidden_tests(self) -> str:
        """What stands in the way of the task's tests, "" if they are in place."""
        for path, text in self.task.test_files.items():
            folder = str(PurePosixPath(path).parent)
            made = await self._step(
                f"rm -rf -- {shlex.quote(path)} && mkdir -p -- {shlex.quote(folder)}", "make place for a hidden test"
            )
            if made.exit_code:
                return _last_line(made)
            await self.sandbox.write_file(f"{self.task.workdir}/{path}", text.encode())
        if self.task.test_patch and not self.task.test_files:
            file = f"{self.scratch}/test.patch"
            await self.sandbox.write_file(file, self.task.test_patch.encode())
            applied = await self._step(f"{_GIT} apply --whitespace=nowarn {file}", "apply test_patch")
            if applied.exit_code:
                return f"test_patch doesn't apply: {_last_line(applied)}"
        return ""

    async def run_tests(self) -> ExecResult:
        await self.sandbox.write_file(f"{self.scratch}/{self.suite.plugin}.py", PLUGIN_SOURCE.read_bytes())
        await self.sandbox.write_file(f"{self.scratch}/secret", self.secret)
        command = self._with_plugin(self.suite.command(self.task, self._wanted()))
        return await self.sandbox.exec(command, timeout_s=self.config.test_timeout_s)

    def _with_plugin(self, command: str) -> str:
        return f"export PYTHONPATH={self.scratch}${{PYTHONPATH:+:$PYTHONPATH}}\n{command}"

    async def has_begun(self) -> bool:
        """Whether the plugin was loaded."""
        return (await self._step(f"[ ! -e {self.scratch}/secret ]", "look for the secret")).exit_code == 0

    async def report(self) -> bytes:
        """Raises `FileNotFoundError` or `BadReport`."""
        path = f"{self.scratch}/report"
        size = await self._step(f"stat -c %s {path}", "look for the report")
        if size.exit_code:
            raise FileNotFoundError("no report was written")
        if not size.output.strip().isdecimal() or int(size.output) > _MAX_REPORT_BYTES:
            raise BadReport(f"the report has more than {_MAX_REPORT_BYTES} bytes")
        record, self.altered = unseal(await self.sandbox.read_file(path), self.secret)
        return record

    def _verdict(self, verdicts: dict[str, bool], log: str) -> Grade:
        passed = tuple(test for test in self._wanted() if verdicts.get(test))
        failed = tuple(test for test in self._wanted() if not verdicts.get(test))
        if not failed:
            return Grade(resolved=True, reward=1.0, passed=passed, log=log, reason="all tests pass")
        missing = sum(test not in verdicts for test in failed)
        reason = f"{len(failed)} of {len(passed) + len(failed)} tests don't pass"
        if missing:
            reason += f", {missing} of them didn't run"
        return Grade(resolved=False, reward=0.0, passed=passed, failed=failed, log=log, reason=reason)

    def _wanted(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.task.fail_to_pass + self.task.pass_to_pass))

    def _hidden_paths(self) -> list[str]:
        """Relative to the workdir: what of the patch is not the agent's business."""
        task = self.task
        hidden = [path.removeprefix(f"{task.workdir}/") for path in task.hidden_paths]
        tests = list(task.test_files) or patched_paths(task.test_patch)
        reference = patched_paths(task.patch)
        # A doctest's file is a source file; where the fix is in it, the patch may write it, docstrings included.
        judging = [file for file in map(test_file, self._wanted()) if file and file not in reference]
        runner = [path for path in self.suite.runner if not any(_is_at(file, path) for file in reference)]
        return [*tests, *hidden, *judging, *runner]

    async def _must(self, command: str, purpose: str) -> ExecResult:
        result = await self._step(command, purpose)
        if result.exit_code:
            raise SandboxFailed(f"it can't {purpose}: {_last_line(result)}")
        return result

    async def _step(self, command: str, purpose: str) -> ExecResult:
        """One of the grader's own commands, which take no time in a healthy sandbox."""
        result = await self.sandbox.exec(command, timeout_s=self.config.step_timeout_s)
        if result.timed_out:
            raise SandboxFailed(f"it took over {result.took_s:.0f} s to {purpose}")
        return result


@dataclass(frozen=True, slots=True)
class _Baseline:
    """How the tests run where no agent was: with the reference patch, for the bug itself may hang them; without a
    patch where the task has none. `trouble` is what is wrong with them; what is `altered` is the doing of the
    image's plugins."""

    trouble: str
    altered: frozenset[str]


async def _run_baseline(task: Task, make_sandbox: MakeSandbox, config: GradingConfig) -> _Baseline:
    async with make_sandbox() as sandbox:
        grading = _Grading(task, sandbox, config)
        await grading.prepare()
        await grading.put_reference_patch()
        if trouble := await grading.put_hidden_tests():
            return _Baseline(f"the hidden tests don't go in: {trouble}", frozenset())
        ran = await grading.run_tests()
        if ran.timed_out:
            trouble = f"its tests take over {config.test_timeout_s:.0f} s; raise grading.test_timeout_s"
        else:
            try:
                await grading.report()
            except (BadReport, FileNotFoundError) as error:
                if task.patch or not await grading.has_begun():  # the bug itself may end them
                    trouble = f"the tests' command leaves no report ({error}): {_last_line(ran)}"
        return _Baseline(trouble, grading.altered)


def _is_at(file: str, path: str) -> bool:
    return file == path or file.startswith(f"{path}/")


def _failed(reason: str, log: str = "") -> Grade:
    return Grade(resolved=False, reward=0.0, log=log, reason=reason)


def _last_line(result: ExecResult) -> str:
    lines = result.output.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.exit_code}"
