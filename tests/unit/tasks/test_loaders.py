"""Task files: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.loaders import load_tasks, save_tasks
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import generate

ROW: dict[str, Any] = {
    "instance_id": "acme__lib-1",
    "repo": "acme/lib",
    "base_commit": "a" * 40,
    "problem_statement": "It is wrong.",
    "image_name": "acme/lib:1",
    "FAIL_TO_PASS": ["tests/test_a.py::test_b"],
    "PASS_TO_PASS": [],
}


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_one(tmp_path: Path, row: dict[str, Any]) -> Task:
    (task,) = load_tasks(write_jsonl(tmp_path / "tasks.jsonl", row))
    return task


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(TaskError) as caught:
        load()
    return str(caught.value)


@pytest.mark.parametrize("tests", [["t.py::a", "t.py::b"], '["t.py::a", "t.py::b"]'], ids=["list", "json"])
def test_test_names_may_be_a_list_or_a_json_string(tmp_path: Path, tests: object) -> None:
    task = load_one(tmp_path, ROW | {"FAIL_TO_PASS": tests, "PASS_TO_PASS": tests})
    assert task.fail_to_pass == task.pass_to_pass == ("t.py::a", "t.py::b")


@pytest.mark.parametrize("column", ["image_name", "docker_image", "image"])
def test_the_image_has_three_possible_columns(tmp_path: Path, column: str) -> None:
    row = {name: value for name, value in ROW.items() if name != "image_name"}
    assert load_one(tmp_path, row | {column: "acme/other:2"}).image == "acme/other:2"


def test_what_a_row_leaves_out_has_the_defaults_of_a_task(tmp_path: Path) -> None:
    task = load_one(tmp_path, ROW | {"test_command": None, "workdir": ""})
    assert (task.workdir, task.kind, task.files) == ("/testbed", "swe", {})
    assert task.test_command.startswith("python -m pytest")


def test_unknown_columns_are_kept(tmp_path: Path) -> None:
    task = load_one(tmp_path, ROW | {"hints_text": "none", "stars": 3})
    assert task.extra == {"hints_text": "none", "stars": 3}


def test_parquet_rows_are_read_like_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW | {"instance_id": "other"}]), path)
    assert [task.instance_id for task in load_tasks(path)] == ["acme__lib-1", "other"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_saved_tasks_are_read_back_equal(tmp_path: Path, suffix: str) -> None:
    tasks = [*generate(seed=3, count=2, difficulty="hard"), load_one(tmp_path, ROW | {"test_patch": "diff"})]
    save_tasks(tasks, tmp_path / f"saved{suffix}")
    loaded = load_tasks(tmp_path / f"saved{suffix}")
    assert [strip_none(task) for task in loaded] == [strip_none(task) for task in tasks]


def strip_none(task: Task) -> dict[str, Any]:
    """Parquet gives every row every column, so `extra` may gain a None."""
    fields = {name: getattr(task, name) for name in Task.__dataclass_fields__}
    return fields | {"extra": {name: value for name, value in task.extra.items() if value is not None}}


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "tasks.jsonl", ROW)
    path.write_text(path.read_text() + "not json\n")
    assert len(load_tasks(path, limit=1)) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(lambda: load_tasks(tmp_path / "gone.jsonl"))
    assert "gone.jsonl" in message and "task.path" in message


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    assert ".jsonl or .parquet" in refusal(lambda: load_tasks(tmp_path / "tasks.csv"))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "no task" in refusal(lambda: load_tasks(write_jsonl(tmp_path / "tasks.jsonl")))


def test_bad_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n{broken\n")
    assert "line 3" in refusal(lambda: load_tasks(path))


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("[1]\n")
    assert "line 1" in refusal(lambda: load_tasks(path))


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.parquet"
    path.write_bytes(b"no parquet at all")
    assert "not a parquet file" in refusal(lambda: load_tasks(path))


def test_a_row_without_an_image_names_row_id_field_and_remedy(tmp_path: Path) -> None:
    row = {name: value for name, value in ROW.items() if name != "image_name"}
    message = refusal(lambda: load_tasks(write_jsonl(tmp_path / "t.jsonl", ROW, row | {"instance_id": "second"})))
    for part in ("t.jsonl", "line 2", "second", "image_name", "docker_image"):
        assert part in message


@pytest.mark.parametrize("column", ["instance_id", "repo", "base_commit", "problem_statement", "FAIL_TO_PASS"])
@pytest.mark.parametrize("empty", [None, "", []])
def test_a_missing_field_is_named(tmp_path: Path, column: str, empty: object) -> None:
    message = refusal(lambda: load_one(tmp_path, ROW | {column: empty}))
    assert "line 1" in message and column in message


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("repo", 7),
        ("FAIL_TO_PASS", "not json"),
        ("FAIL_TO_PASS", '{"a": 1}'),
        ("PASS_TO_PASS", [1]),
        ("files", {"/testbed/a": "not base64!"}),
        ("files", {"a.py": ""}),
        ("files", {"/testbed/../etc/passwd": ""}),
        ("test_files", {"/testbed/a.py": ""}),
        ("test_files", {"../a.py": ""}),
        ("test_files", ["a"]),
    ],
)
def test_a_field_that_cant_be_read_is_named(tmp_path: Path, column: str, value: object) -> None:
    assert column in refusal(lambda: load_one(tmp_path, ROW | {column: value}))


def test_a_duplicate_instance_id_names_both_rows(tmp_path: Path) -> None:
    message = refusal(lambda: load_tasks(write_jsonl(tmp_path / "tasks.jsonl", ROW, ROW)))
    assert "line 1" in message and "line 2" in message and "acme__lib-1" in message


def test_a_row_with_its_files_runs_anywhere_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert not load_one(tmp_path, ROW).self_contained
    carried = ROW | {"files": {"/testbed/a.py": ""}}
    assert load_one(tmp_path, carried).self_contained
    assert not load_one(tmp_path, carried | {"self_contained": False}).self_contained
    with pytest.raises(TaskError, match="self_contained is str; it must be true or false"):
        load_one(tmp_path, carried | {"self_contained": "no"})
