from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.config import TaskConfig, build_tasks
from thunder_rollout.tasks.loaders import save_tasks


@pytest.mark.parametrize(
    "wrong", [{"kind": "dream"}, {"count": 0}, {"difficulty": "fun"}, {"limit": 0}, {"kind": "file", "path": None}]
)
def test_an_impossible_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"task.{list(wrong)[-1]}="):
        TaskConfig(**wrong)


def test_toy_tasks_are_made_as_asked() -> None:
    tasks = build_tasks(TaskConfig(kind="toy", seed=5, count=4, limit=3))
    assert [task.instance_id for task in tasks] == ["toy-easy-5-0", "toy-easy-5-1", "toy-easy-5-2"]


def test_a_task_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    made = build_tasks(TaskConfig(kind="toy", count=3))
    save_tasks(made, path)
    assert build_tasks(TaskConfig(kind="file", path=str(path), limit=2)) == made[:2]
