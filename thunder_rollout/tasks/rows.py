"""One task as a row of columns, as it stands in a jsonl or parquet file.

SWE-bench's columns keep their names (FAIL_TO_PASS is a list or, as SWE-bench has it, a JSON
string); what only this project knows has columns of its own: `workdir`, `files` (absolute path
to base64), `setup`, `test_files` (relative path to text), `test_command`, `suite`, `env`,
`hidden_paths`, `self_contained` (left out: whether there are `files`), `kind`. A mapping or list
may also stand as a JSON string, which is how parquet holds them. Columns nobody knows are kept in
`Task.extra` and written back beside the others.
Rows of published data sets become such rows in `sources`.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.task import Task

IMAGE_COLUMNS = ("image_name", "docker_image", "image")  # the first that is there wins
_REQUIRED_TEXT = ("instance_id", "repo", "base_commit", "problem_statement")
_OPTIONAL_TEXT = ("patch", "test_patch", "version", "workdir", "setup", "test_command", "suite", "kind")
_NOT_EMPTY = ("workdir", "test_command", "suite", "kind")  # left out or empty, Task's default holds
_KNOWN = {
    *_REQUIRED_TEXT,
    *_OPTIONAL_TEXT,
    *IMAGE_COLUMNS,
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
    "files",
    "test_files",
    "env",
    "hidden_paths",
    "self_contained",
}


def task_from_row(row: dict[str, Any], where: str) -> Task:
    """Raises `TaskError`, which starts with `where` (file and row) and names column and remedy."""
    return _RowReader(row, where).task()


def row_from_task(task: Task) -> dict[str, Any]:
    """The row that `task_from_row` reads back as an equal task; `files` are base64."""
    row: dict[str, Any] = dict(task.extra)
    row |= {name: getattr(task, name) for name in (*_REQUIRED_TEXT, *_OPTIONAL_TEXT)}
    row |= {"image_name": task.image, "FAIL_TO_PASS": list(task.fail_to_pass), "PASS_TO_PASS": list(task.pass_to_pass)}
    row["files"] = {path: base64.b64encode(content).decode() for path, content in task.files.items()}
    row |= {"test_files": dict(task.test_files), "env": dict(task.env), "hidden_paths": list(task.hidden_paths)}
    row["self_contained"] = task.self_contained
    return row


class _RowReader:
    """Reads one row's columns; every complaint says where the row is."""

    def __init__(self, row: dict[str, Any], where: str) -> None:
        self._row = row
        instance_id = row.get("instance_id")
        self._where = f"{where} (instance_id={instance_id})" if instance_id else where

    def task(self) -> Task:
        required = {name: self._required_text(name) for name in _REQUIRED_TEXT}
        texts = {name: self._text(name) for name in _OPTIONAL_TEXT}
        optional = {name: text for name, text in texts.items() if text or name not in _NOT_EMPTY}
        fail_to_pass = self._names("FAIL_TO_PASS")
        if not fail_to_pass:
            raise self._error("FAIL_TO_PASS", "is missing or empty", "name the tests that the fix makes pass")
        return Task(
            **required,
            **optional,
            image=self._image(),
            fail_to_pass=fail_to_pass,
            pass_to_pass=self._names("PASS_TO_PASS"),
            files=(files := self._files()),
            self_contained=self._flag("self_contained", default=bool(files)),
            test_files=self._test_files(),
            env=self._mapping("env"),
            hidden_paths=self._names("hidden_paths"),
            extra={name: value for name, value in self._row.items() if name not in _KNOWN},
        )

    def _required_text(self, name: str) -> str:
        text = self._text(name)
        if not text:
            raise self._error(name, "is missing or empty", "every row needs one")
        return text

    def _text(self, name: str) -> str:
        value = self._row.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._error(name, f"is {type(value).__name__}", "it must be a string")
        return value

    def _image(self) -> str:
        for name in IMAGE_COLUMNS:
            if image := self._text(name):
                return image
        raise self._error(
            IMAGE_COLUMNS[0], "is missing", f"give the row a Docker image in one of {', '.join(IMAGE_COLUMNS)}"
        )

    def _names(self, name: str) -> tuple[str, ...]:
        value = self._decoded(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, "can't be read", "it must be a list of strings, or that list as a JSON string")
        return tuple(value)

    def _mapping(self, name: str) -> dict[str, str]:
        value = self._decoded(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._error(name, "can't be read", "it must map paths to strings, or be that mapping as JSON")
        return value

    def _test_files(self) -> dict[str, str]:
        files = self._mapping("test_files")
        for path in files:
            if path.startswith("/") or ".." in path.split("/"):
                raise self._error("test_files", f"has {path!r}", "give paths relative to workdir, and inside it")
        return files

    def _files(self) -> dict[str, bytes]:
        files = self._mapping("files")
        for path in files:
            if not path.startswith("/") or ".." in path.split("/"):
                raise self._error("files", f"has {path!r}", "give absolute paths, such as /testbed/setup.py")
        try:
            return {path: base64.b64decode(text, validate=True) for path, text in files.items()}
        except (binascii.Error, ValueError) as error:
            raise self._error("files", f"isn't base64 ({error})", "encode every content with base64") from None

    def _flag(self, name: str, *, default: bool) -> bool:
        value = self._row.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, f"is {type(value).__name__}", "it must be true or false")
        return default if value is None else value

    def _decoded(self, name: str) -> Any:
        """The column's value, out of its JSON string if it is one; None if there is nothing."""
        value = self._row.get(name)
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise self._error(name, f"is a string but not JSON ({error})", "write it as JSON") from None

    def _error(self, name: str, wrong: str, remedy: str) -> TaskError:
        return TaskError(f"{self._where}: {name} {wrong}; {remedy}")
