"""Tasks become verl's train and validation files, each task always in the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.config import TaskConfig, build_tasks
from thunder_rollout.tasks.to_verl import ToVerlConfig, write_verl_files
from thunder_rollout.tasks.verl_rows import task_of_verl_row


def config(out: Path, count: int = 40, **changes) -> ToVerlConfig:
    return ToVerlConfig(task=TaskConfig(count=count), out=str(out), **changes)


def rows(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def ids(path: Path) -> set[str]:
    return {row["extra_info"]["instance_id"] for row in rows(path)}


def test_every_task_is_in_one_of_the_two_files(tmp_path: Path) -> None:
    written = write_verl_files(config(tmp_path, validation_share=0.25))
    assert list(written) == [tmp_path / "train.parquet", tmp_path / "validation.parquet"]
    tasks = [task_of_verl_row(row["extra_info"]) for path in written for row in rows(path)]
    assert sorted(tasks, key=lambda task: task.instance_id) == sorted(
        build_tasks(TaskConfig(count=40)), key=lambda task: task.instance_id
    )
    assert 4 <= written[tmp_path / "validation.parquet"] <= 16


def test_rows_say_their_split_and_their_place_in_it(tmp_path: Path) -> None:
    for path in write_verl_files(config(tmp_path, validation_share=0.5)):
        places = [(row["extra_info"]["split"], row["extra_info"]["index"]) for row in rows(path)]
        assert places == [(path.stem, index) for index in range(len(places))]


def test_a_task_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    write_verl_files(config(tmp_path / "few", count=20, validation_share=0.5))
    write_verl_files(config(tmp_path / "many", count=60, validation_share=0.5))
    for name in ("train.parquet", "validation.parquet"):
        assert ids(tmp_path / "few" / name) < ids(tmp_path / "many" / name)


@pytest.mark.parametrize(("share", "name"), [(0, "train"), (1, "validation")])
def test_one_split_alone_writes_one_file(tmp_path: Path, share: int, name: str) -> None:
    assert write_verl_files(config(tmp_path, validation_share=share)) == {tmp_path / f"{name}.parquet": 40}
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.parquet"]


def test_an_empty_split_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_share=0.001: leaves none of 2 tasks for validation; give more"):
        write_verl_files(config(tmp_path, count=2, validation_share=0.001))
    assert not list(tmp_path.iterdir())


def test_an_impossible_share_is_named() -> None:
    with pytest.raises(ConfigError, match=r"validation_share=1.5: must be from 0 to 1"):
        config(Path("unused"), validation_share=1.5)


def test_another_system_prompt_is_what_the_agent_reads(tmp_path: Path) -> None:
    write_verl_files(config(tmp_path, validation_share=0, system_prompt="Mend it."))
    assert rows(tmp_path / "train.parquet")[0]["prompt"][0] == {"role": "system", "content": "Mend it."}
