"""The task factory with an image for its package, on a real engine."""

from __future__ import annotations

from pathlib import Path

import docker

from tests.support.tiny_package import write_distribution
from thunder_rollout.runtime.make_tasks import MakeTasksConfig, run_make_tasks
from thunder_rollout.sandbox.config import SandboxConfig


async def test_a_package_gets_an_image_and_its_tasks_are_valid(tmp_path: Path, client: docker.DockerClient) -> None:
    config = MakeTasksConfig(
        package="tiny",
        path=str(write_distribution(tmp_path)),
        out=str(tmp_path / "tasks.jsonl"),
        count=2,
        sandbox=SandboxConfig(backend="docker"),
    )
    progress, _ = await run_make_tasks(config)
    try:
        assert len(progress.tasks) == 2
        for task in progress.tasks:
            assert task.image.startswith("thunder-tasks/tiny:1.5-") and not task.self_contained
            assert list(task.files) == ["/testbed/src/tiny/numbers.py"]
            assert task.fail_to_pass and task.pass_to_pass
    finally:
        client.images.remove(progress.tasks[0].image, force=True)
