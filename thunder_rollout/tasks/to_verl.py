"""`thunder-rollout tasks to-verl`: tasks into the parquet files that verl's trainer reads.

Contract: which split a task is in depends on its instance_id alone, so that a task never moves from one to the
other when tasks are added, left out or reordered. A file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.agent.config import SYSTEM_PROMPT
from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.config import TaskConfig, build_tasks
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.verl_rows import TRAIN, VALIDATION, verl_row


@dataclass(frozen=True, slots=True, kw_only=True)
class ToVerlConfig:
    """`conf/to_verl.yaml`. A share of 0 or 1 gives one split only, whose file alone is written."""

    task: TaskConfig
    out: str = "runs/verl_data"
    validation_share: float = 0.1
    system_prompt: str | None = None  # None: the agent's own

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share <= 1:
            raise ConfigError(f"validation_share={self.validation_share!r}: must be from 0 to 1")


def write_verl_files(config: ToVerlConfig) -> dict[Path, int]:
    """The files written and their numbers of rows. Raises `TaskError` for a task that can't be used, `ConfigError`
    where a split that was asked for stays empty."""
    splits: dict[str, list[Task]] = {TRAIN: [], VALIDATION: []}
    for task in build_tasks(config.task):
        splits[split_of(task.instance_id, config.validation_share)].append(task)
    if 0 < config.validation_share < 1 and (empty := [name for name, tasks in splits.items() if not tasks]):
        num_tasks = sum(map(len, splits.values()))
        raise ConfigError(
            f"validation_share={config.validation_share:g}: leaves none of {num_tasks} tasks for {empty[0]}; "
            "give more tasks, another share, or 0 or 1 for one split only"
        )
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        _write(folder / f"{name}.parquet", name, tasks, config.system_prompt or SYSTEM_PROMPT): len(tasks)
        for name, tasks in splits.items()
        if tasks
    }


def split_of(instance_id: str, validation_share: float) -> str:
    digest = hashlib.sha256(instance_id.encode()).digest()
    return VALIDATION if int.from_bytes(digest[:6], "big") / 2**48 < validation_share else TRAIN


def _write(path: Path, split: str, tasks: list[Task], system_prompt: str) -> Path:
    import pyarrow
    from pyarrow import parquet

    rows = [verl_row(task, split=split, index=i, system_prompt=system_prompt) for i, task in enumerate(tasks)]
    unfinished = path.with_suffix(".unfinished")
    parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
    unfinished.replace(path)
    return path
