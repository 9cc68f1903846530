"""`make-tasks` from a distribution to a file, in local sandboxes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.tiny_package import write_distribution
from thunder_rollout.runtime.make_tasks import MakeTasksConfig, _fingerprint, print_report, run_make_tasks
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.local import local_unavailable
from thunder_rollout.sandbox.protocol import SandboxLimits
from thunder_rollout.tasks.factory.package import Package
from thunder_rollout.tasks.factory.suite import Place
from thunder_rollout.tasks.grading import GradingConfig
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


@pytest.mark.parametrize(
    ("changes", "limits", "is_same"),
    [
        ({"count": 3}, SandboxLimits(), True),
        ({"grading": GradingConfig(test_timeout_s=1.0)}, SandboxLimits(), False),
        ({}, SandboxLimits(memory_bytes=2**30), False),
    ],
)
def test_what_was_tried_under_other_conditions_is_tried_again(
    changes: dict[str, Any], limits: SandboxLimits, is_same: bool
) -> None:
    config = MakeTasksConfig(package="tiny", version="1")
    package = Package(name="tiny", version="1", files={}, site={})
    place = Place(package=package, image="i", built=False, limits=SandboxLimits())
    same = _fingerprint(place, config) == _fingerprint(replace(place, limits=limits), replace(config, **changes))
    assert same == is_same
