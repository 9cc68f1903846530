"""From a package to tasks: inject a bug, run the suite, keep what some tests notice and not all.

A task is kept if at least one test fails that passed twice without the bug, some still pass, and no
more than `max_failed_share` fail. The agent gets the package with the bug as one commit, without
the test files in which a test fails; grading puts these back. FAIL_TO_PASS are the tests that fail,
PASS_TO_PASS the others of the same files. The reference patch is the edit undone.

The same package, settings and seed give the same tasks in the same order, however many sandboxes
run at once: bugs are judged in a fixed order. What was tried is noted in a journal, so a run that
was stopped goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shlex
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from thunder_rollout.errors import TaskError
from thunder_rollout.sandbox.protocol import Sandbox
from thunder_rollout.tasks.environment import sandbox_spec
from thunder_rollout.tasks.factory.config import FactoryConfig
from thunder_rollout.tasks.factory.journal import Attempt, Journal
from thunder_rollout.tasks.factory.operators import Mutation, find_mutations
from thunder_rollout.tasks.factory.package import WORKDIR, Package
from thunder_rollout.tasks.factory.statement import problem_statement
from thunder_rollout.tasks.factory.suite import TEST_COMMAND, Fresh, Place, SuiteRun, run_suite
from thunder_rollout.tasks.grading import grade
from thunder_rollout.tasks.patches import make_patch
from thunder_rollout.tasks.repository import new_repository
from thunder_rollout.tasks.task import Task

logger = logging.getLogger(__name__)

_MIN_TIMEOUT_S = 10.0
_SLOWER = 5.0  # than without the bug, before a run counts as hanging
_NOOP_PATCH = (
    b"diff --git a/thunder_noop.txt b/thunder_noop.txt\nnew file mode 100644\n"
    b"--- /dev/null\n+++ b/thunder_noop.txt\n@@ -0,0 +1 @@\n+nothing\n"
)
KEPT = "kept"
_ENOUGH = "enough of its function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    path: str
    mutation: Mutation

    @property
    def key(self) -> str:
        edit = self.mutation
        text = f"{self.path}:{edit.operator}:{edit.start}:{edit.end}:{edit.replacement}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.mutation.function}"


@dataclass(slots=True)
class Progress:
    """How far it is; `outcomes` counts what became of every bug tried."""

    stable_tests: int = 0
    suite_s: float = 0.0
    num_found: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    tasks: list[Task] = field(default_factory=list)


async def make_tasks(
    place: Place,
    config: FactoryConfig,
    fresh: Fresh,
    journal: Journal,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Up to `count` tasks. Raises `TaskError` if the suite doesn't run without a bug, `SandboxFailed`
    and `GradingFailed` if the machinery fails."""
    progress = Progress()
    stable, clean_s = await _stable_tests(place, config, fresh)
    progress.stable_tests, progress.suite_s = len(stable), clean_s
    bugs = draw_bugs(place.package, config)
    progress.num_found = len(bugs)
    trier = _Trier(place, config, fresh, stable, max(_MIN_TIMEOUT_S, _SLOWER * clean_s), journal)
    per_place: Counter[str] = Counter()

    async def attempt_if_wanted(bug: Bug) -> Attempt:
        if per_place[bug.place] >= config.max_per_function:
            return Attempt(key=bug.key, outcome=_ENOUGH)
        return await trier.attempt(bug)

    on_progress(progress)
    async with _in_order(bugs[: config.max_tried], attempt_if_wanted, config.concurrency) as attempts:
        async for bug, attempt in attempts:
            outcome = attempt.outcome
            if attempt.task is not None and per_place[bug.place] >= config.max_per_function:
                outcome = _ENOUGH
            elif attempt.task is not None:
                per_place[bug.place] += 1
                progress.tasks.append(attempt.task)
            progress.outcomes[outcome] += 1
            on_progress(progress)
            if len(progress.tasks) == config.count:
                break
    return progress


def draw_bugs(package: Package, config: FactoryConfig) -> list[Bug]:
    """Every bug there is, shuffled by the seed, one operator after the other in turn."""
    rng = random.Random(f"{config.seed}:{package.name}:{package.version}")
    by_operator: dict[str, deque[Bug]] = {name: deque() for name in config.operators}
    found = [
        Bug(path=path, mutation=mutation)
        for path, text in package.modules.items()
        for mutation in find_mutations(text, config.operators)
    ]
    rng.shuffle(found)
    for bug in found:
        by_operator[bug.mutation.operator].append(bug)
    return list(_in_turn(list(by_operator.values())))


def _in_turn(queues: list[deque[Bug]]) -> Iterator[Bug]:
    while queues := [queue for queue in queues if queue]:
        for queue in queues:
            yield queue.popleft()


async def _stable_tests(place: Place, config: FactoryConfig, fresh: Fresh) -> tuple[set[str], float]:
    """The tests that pass twice without a bug, and the seconds that the suite takes."""
    runs = [await run_suite(place, {}, fresh, config.suite_timeout_s) for _ in range(2)]
    for run in runs:
        if run.trouble:
            raise TaskError(f"package={config.package}: {run.trouble} without a bug; its suite says {run.log[-800:]}")
    stable = {test for test, passed in runs[0].passed.items() if passed and runs[1].passed.get(test)}
    if not stable:
        raise TaskError(f"package={config.package}: none of its tests passes twice; it says {runs[1].log[-800:]}")
    return stable, max(run.took_s for run in runs)


@dataclass(frozen=True, slots=True)
class _Trier:
    place: Place
    config: FactoryConfig
    fresh: Fresh
    stable: set[str]
    timeout_s: float
    journal: Journal

    async def attempt(self, bug: Bug) -> Attempt:
        if (known := self.journal.find(bug.key)) is not None:
            return known
        attempt = await self._try(bug)
        self.journal.note(attempt)
        return attempt

    async def _try(self, bug: Bug) -> Attempt:
        source = self.place.package.modules[bug.path]
        buggy = {bug.path: bug.mutation.apply(source).encode()}
        run = await run_suite(self.place, buggy, self.fresh, self.timeout_s)
        if outcome := self._refusal(run):
            return Attempt(key=bug.key, outcome=outcome)
        task = self._task(bug, buggy, run)
        async with self._fresh_for(task, for_agent=True) as sandbox:
            commit = (await sandbox.exec("git rev-parse HEAD", timeout_s=60)).output.strip()
        task = replace(task, base_commit=commit)
        if self.config.validate and (trouble := await self._invalid(task)):
            logger.warning("task %s is invalid: %s", task.instance_id, trouble)
            return Attempt(key=bug.key, outcome="invalid")
        return Attempt(key=bug.key, outcome=KEPT, task=task)

    def _refusal(self, run: SuiteRun) -> str:
        if run.trouble:
            return run.trouble
        failed = self._failed(run)
        if not failed:
            return "unnoticed"
        if len(failed) > self.config.max_failed_share * len(self.stable):
            return "breaks too much"
        if {_file(test) for test in failed} - set(self.place.package.test_files):
            return "noticed by a file that isn't text"
        return "" if self._others(failed) else "nothing left to pass"

    def _failed(self, run: SuiteRun) -> list[str]:
        return sorted(test for test in self.stable if not run.passed.get(test))

    def _others(self, failed: list[str]) -> list[str]:
        files = {_file(test) for test in failed}
        return sorted(test for test in self.stable - set(failed) if _file(test) in files)

    def _task(self, bug: Bug, buggy: dict[str, bytes], run: SuiteRun) -> Task:
        package, failed = self.place.package, self._failed(run)
        sources = {path: package.files[path].decode() for path in dict.fromkeys(map(_file, failed))}
        clean = package.modules[bug.path]
        files = self.place.files(buggy)
        return Task(
            instance_id=f"{package.name}-{package.version}.{bug.mutation.operator}.{bug.key}",
            repo=f"pypi/{package.name}",
            version=package.version,
            base_commit="HEAD",
            problem_statement=problem_statement(package.name, failed, sources, run.failures),
            image=self.place.image,
            fail_to_pass=tuple(failed),
            pass_to_pass=tuple(self._others(failed)),
            patch=make_patch({bug.path: buggy[bug.path].decode()}, {bug.path: clean}),
            workdir=WORKDIR,
            files={path: content for path, content in files.items() if path.removeprefix(f"{WORKDIR}/") not in sources},
            setup=f"cd {WORKDIR} && rm -f -- {shlex.join(sources)} && {new_repository()}",
            test_files=sources,
            test_command=TEST_COMMAND,
            env=self.place.env,
            self_contained=not self.place.built,
            extra={"operator": bug.mutation.operator, "function": bug.mutation.function, "seed": self.config.seed},
        )

    async def _invalid(self, task: Task) -> str:
        """Why the task can't be used. The reference patch must grade to 1 and the empty patch to 0, also
        where the tests do run: then exactly FAIL_TO_PASS fail."""
        reference, empty, noop = [
            await grade(task, patch, lambda: self._fresh_for(task), config=self.config.grading)
            for patch in (task.patch.encode(), b"", _NOOP_PATCH)
        ]
        if reference.reward != 1.0:
            return f"the reference patch grades to {reference.reward}: {reference.reason}"
        if empty.reward != 0.0 or noop.reward != 0.0:
            return "the empty patch doesn't grade to 0"
        return "" if set(noop.failed) == set(task.fail_to_pass) else "without the fix other tests fail too"

    def _fresh_for(self, task: Task, *, for_agent: bool = False) -> AbstractAsyncContextManager[Sandbox]:
        return self.fresh(sandbox_spec(task, for_agent=for_agent, limits=self.place.limits))


@asynccontextmanager
async def _in_order(
    bugs: list[Bug], work: Callable[[Bug], Coroutine[None, None, Attempt]], width: int
) -> AsyncIterator[AsyncIterator[tuple[Bug, Attempt]]]:
    """Each bug with its attempt, in the order of `bugs`, `width` at a time; the rest is cancelled at the end."""
    running: deque[tuple[Bug, asyncio.Task[Attempt]]] = deque()
    todo = iter(bugs)

    async def results() -> AsyncGenerator[tuple[Bug, Attempt], None]:
        running.extend((bug, asyncio.create_task(work(bug))) for bug in islice(todo, width))
        while running:
            bug, attempt = running[0]
            result = await attempt
            running.popleft()
            running.extend((bug, asyncio.create_task(work(bug))) for bug in islice(todo, 1))
            yield bug, result

    stream = results()
    try:
        yield stream
    finally:
        await stream.aclose()
        for _, attempt in running:
            attempt.cancel()
        await asyncio.gather(*(attempt for _, attempt in running), return_exceptions=True)


def _file(test: str) -> str:
    return test.partition("::")[0]
