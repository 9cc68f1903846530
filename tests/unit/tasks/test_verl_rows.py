"""A task survives the way into verl's parquet and out of the row that an agent loop gets."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.toy import generate
from thunder_rollout.tasks.verl_rows import task_of_verl_row, verl_row

TASK = generate(seed=0, count=1, difficulty="easy")[0]


def test_a_row_has_the_columns_that_verl_reads() -> None:
    row = verl_row(TASK, split="train", index=3)
    assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info", "agent_name"]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == TASK.problem_statement
    assert row["reward_model"] == {"style": "rule", "ground_truth": TASK.instance_id}
    assert (row["extra_info"]["split"], row["extra_info"]["index"]) == ("train", 3)


def test_the_task_comes_back_equal_through_parquet(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([verl_row(TASK, split="train", index=0)]), file)
    (row,) = parquet.read_table(file).to_pylist()
    assert task_of_verl_row(row["extra_info"]) == TASK


@pytest.mark.parametrize("extra_info", [None, {}, {"task": 3}])
def test_a_row_without_a_task_is_told_how_to_get_one(extra_info: dict[str, object] | None) -> None:
    with pytest.raises(TaskError, match="to-verl"):
        task_of_verl_row(extra_info)


def test_a_task_that_is_no_json_is_refused() -> None:
    with pytest.raises(TaskError, match="isn't JSON"):
        task_of_verl_row({"task": "{"})
