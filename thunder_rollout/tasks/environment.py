"""The sandboxes of a task: where it is worked on and, afresh, where it is graded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from thunder_rollout.sandbox.protocol import Sandbox, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.task import Task


def sandbox_spec(
    task: Task, *, limits: SandboxLimits | None = None, labels: dict[str, str] | None = None
) -> SandboxSpec:
    return SandboxSpec(
        image=task.image,
        workdir=task.workdir,
        files=task.files,
        setup=task.setup,
        limits=limits or SandboxLimits(),
        labels=labels or {},
    )


@asynccontextmanager
async def started(sandbox: Sandbox) -> AsyncIterator[Sandbox]:
    """Stopped at the end, whatever happens, also a start that fails half-way."""
    try:
        await sandbox.start()
        yield sandbox
    finally:
        await sandbox.stop()
