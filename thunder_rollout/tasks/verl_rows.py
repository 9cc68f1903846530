"""One task as a row of verl's parquet, and the task back out of the row that an agent loop gets.

`verl_row` gives verl's columns. The whole task goes along in `extra_info.task` as a JSON string (see `rows`),
so that whoever rolls it out needs no other file. The prompt is what the agent reads first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from thunder_rollout.agent.config import SYSTEM_PROMPT
from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.rows import row_from_task, task_from_row
from thunder_rollout.tasks.task import Task

AGENT_NAME = "thunder_swe"
TRAIN, VALIDATION = "train", "validation"


def verl_row(task: Task, *, split: str, index: int, system_prompt: str = SYSTEM_PROMPT) -> dict[str, Any]:
    """`index` is the row's place in its split; `data_source`, by which verl groups validation scores, is the
    task's kind."""
    return {
        "data_source": task.kind,
        "prompt": [
            {"role": "system", "content": system_prompt},
            {"role": "user", "content": task.problem_statement},
        ],
        "ability": "swe",
        "reward_model": {"style": "rule", "ground_truth": task.instance_id},
        "extra_info": {
            "split": split,
            "index": index,
            "instance_id": task.instance_id,
            "image": task.image,
            "task": json.dumps(row_from_task(task)),
        },
        "agent_name": AGENT_NAME,
    }


def task_of_verl_row(extra_info: Mapping[str, Any] | None) -> Task:
    """The task of a row by its column `extra_info`. Raises `TaskError`."""
    text = (extra_info or {}).get("task")
    if not isinstance(text, str):
        raise TaskError(
            f"extra_info of a row for {AGENT_NAME}: task is missing; write it with `thunder-rollout tasks to-verl`"
        )
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"extra_info.task isn't JSON ({error}); write the file again") from None
    return task_from_row(row, "extra_info.task")
