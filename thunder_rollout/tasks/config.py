"""Which tasks to roll out: settings and the factory that turns them into tasks."""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.loaders import load_tasks
from thunder_rollout.tasks.sources import AUTO, SOURCE_NAMES
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import DIFFICULTIES, generate

TASK_KINDS = ("toy", "file")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """`toy` makes `count` tasks of a `difficulty` from `seed`; `file` reads `path`,
    whose rows are those of a `source` (`auto` tells it by their columns).

    `limit` keeps only the first tasks, whichever kind.
    """

    kind: str = "toy"
    seed: int = 0
    count: int = 16
    difficulty: str = "easy"
    path: str | None = None
    source: str = AUTO
    limit: int | None = None

    def __post_init__(self) -> None:
        _require(self.kind in TASK_KINDS, "kind", self.kind, f"one of {', '.join(TASK_KINDS)}")
        _require(self.count >= 1, "count", self.count, ">= 1")
        _require(self.difficulty in DIFFICULTIES, "difficulty", self.difficulty, f"one of {', '.join(DIFFICULTIES)}")
        _require(self.source in SOURCE_NAMES, "source", self.source, f"one of {', '.join(SOURCE_NAMES)}")
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1, or null for all")
        _require(self.kind != "file" or bool(self.path), "path", self.path, "a .jsonl or .parquet file of tasks")


def build_tasks(config: TaskConfig) -> list[Task]:
    """Raises `TaskError` if the file or a row of it can't be used."""
    if config.kind == "file":
        assert config.path is not None  # TaskConfig's own check
        return load_tasks(config.path, limit=config.limit, source=config.source)
    count = config.count if config.limit is None else min(config.count, config.limit)
    return generate(config.seed, count, config.difficulty)


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"task.{name}={value!r}: must be {rule}")
