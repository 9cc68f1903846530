"""Task files: jsonl and parquet in, with SWE-bench's columns or a published data set's; jsonl and parquet out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.rows import row_from_task, task_from_row
from thunder_rollout.tasks.sources import AUTO, adapt_row
from thunder_rollout.tasks.suites import check_gradable
from thunder_rollout.tasks.task import Task

_PARQUET_BATCH_ROWS = 256


def load_tasks(path: str | Path, *, limit: int | None = None, source: str = AUTO) -> list[Task]:
    """The file's tasks in its order, the first `limit` of them if given; `source` is one of `sources`.

    Raises `TaskError` naming file, row, instance_id, column and remedy.
    """
    path = Path(path)
    read = _reader(path)
    tasks: list[Task] = []
    row_of: dict[str, str] = {}
    for place, row in islice(read(path), limit):
        where = f"{path} {place}"
        task = task_from_row(adapt_row(row, source, where), where)
        check_gradable(task)
        if task.instance_id in row_of:
            raise TaskError(
                f"{path} {place}: instance_id={task.instance_id} is also that of {row_of[task.instance_id]}; "
                "every row needs its own"
            )
        row_of[task.instance_id] = place
        tasks.append(task)
    if not tasks:
        raise TaskError(f"{path}: holds no task; give task.path a file with at least one row")
    return tasks


def save_tasks(tasks: list[Task], path: str | Path) -> None:
    """Write a file that `load_tasks` reads back as equal tasks; the suffix chooses the format.

    Parquet holds a list or mapping of `Task.extra` as a JSON string and gives every row every
    extra column, None where it had none.
    """
    path = Path(path)
    rows = [row_from_task(task) for task in tasks]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        _write_parquet(rows, path)
    else:
        raise _unknown_format(path)


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise _unknown_format(path)
    if not path.is_file():
        raise TaskError(f"{path}: no such file; set task.path to a .jsonl or .parquet file that is there")
    return _read_jsonl if path.suffix == ".jsonl" else _read_parquet


def _unknown_format(path: Path) -> TaskError:
    return TaskError(f"{path}: unknown kind of task file; task.path must end in .jsonl or .parquet")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path} line {number}: not JSON ({error}); write one JSON object a line") from None
            if not isinstance(row, dict):
                raise TaskError(f"{path} line {number}: holds a {type(row).__name__}; write one JSON object a line")
            yield f"line {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise TaskError(f"{path}: not a parquet file ({error}); write it anew or use .jsonl") from None


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Lists of tests and mappings go in as JSON strings, as SWE-bench has them."""
    import pyarrow
    from pyarrow import parquet

    flat = [
        {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}
        for row in rows
    ]
    names = dict.fromkeys(name for row in flat for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in flat] for name in names})
    except pyarrow.ArrowException as error:
        raise TaskError(f"{path}: a column of Task.extra mixes types ({error}); save as .jsonl instead") from None
    parquet.write_table(table, path)
