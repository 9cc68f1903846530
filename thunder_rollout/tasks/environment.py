"""The sandboxes of a task: where it is worked on and, afresh, where it is graded."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import PurePosixPath

from thunder_rollout.sandbox.protocol import Sandbox, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.repository import one_commit
from thunder_rollout.tasks.task import Task

_NO_MODULES = {"conftest", "docs", "setup", "test", "tests"}


def sandbox_spec(
    task: Task,
    *,
    for_agent: bool = False,
    limits: SandboxLimits | None = None,
    labels: dict[str, str] | None = None,
) -> SandboxSpec:
    """The grader's sandbox or, `for_agent`, the same without the task's `hidden_paths`."""
    hide = _removal(task) if for_agent and task.hidden_paths else ""
    return SandboxSpec(
        image=task.image,
        workdir=task.workdir,
        files=task.files,
        setup="\n".join(part for part in ("set -e" if hide else "", task.setup, hide) if part),
        env=task.env,
        base_commit=task.base_commit,
        hidden_modules=top_modules(path.removeprefix(f"{task.workdir}/") for path in task.files),
        limits=limits or SandboxLimits(),
        labels=labels or {},
    )


def top_modules(paths: Iterable[str]) -> tuple[str, ...]:
    """What can be imported from a repository with these files, at its top or in `src`."""
    inside = [PurePosixPath(path.removeprefix("src/")) for path in paths if not path.startswith("/")]
    packages = {path.parts[0] for path in inside if path.parts[1:] == ("__init__.py",)}
    modules = {path.stem for path in inside if len(path.parts) == 1 and path.suffix == ".py"}
    return tuple(sorted((packages | modules) - _NO_MODULES))


@asynccontextmanager
async def started(sandbox: Sandbox) -> AsyncIterator[Sandbox]:
    """Stopped at the end, whatever happens, also a start that fails half-way."""
    try:
        await sandbox.start()
        yield sandbox
    finally:
        await sandbox.stop()


def _removal(task: Task) -> str:
    """Without the files and, where git tracks one of them, without the commits that hold it."""
    paths = shlex.join(str(PurePosixPath(task.workdir, path)) for path in task.hidden_paths)
    inside = shlex.join(path for path in task.hidden_paths if not PurePosixPath(path).is_absolute())
    forget = f"git rm -rq --cached --ignore-unmatch -- {inside} && {one_commit()}"
    forget = f'cd {shlex.quote(task.workdir)} && {{ [ -z "$(git ls-files -- {inside})" ] || {{ {forget}; }}; }}'
    return f"rm -rf -- {paths}" + (f" && {forget}" if inside else "")
