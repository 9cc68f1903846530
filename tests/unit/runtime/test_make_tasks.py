"""`make-tasks` from a distribution to a file, in local sandboxes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.tiny_package import write_distribution
from thunder_rollout.runtime.make_tasks import MakeTasksConfig, print_report, run_make_tasks
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.local import local_unavailable
from thunder_rollout.tasks.loaders import load_tasks


@pytest.mark.slow
async def test_a_distribution_becomes_a_task_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if why := local_unavailable():
        pytest.skip(f"no local sandboxes here: {why}")
    config = MakeTasksConfig(
        package="tiny",
        path=str(write_distribution(tmp_path)),
        out=str(tmp_path / "new/tasks.jsonl"),
        count=1,
        concurrency=1,
        sandbox=SandboxConfig(backend="local"),
    )
    progress, path = await run_make_tasks(config)
    assert load_tasks(path) == progress.tasks
    assert progress.tasks[0].image == "thunder-toy:1"
    assert "tasks 1/1" in capsys.readouterr().err
    output = io.StringIO()
    print_report(progress, Console(file=output))
    assert "7 tests in" in output.getvalue() and f"kept: {progress.tasks[0].extra['operator']}" in output.getvalue()
