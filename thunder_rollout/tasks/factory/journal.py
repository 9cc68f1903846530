"""What was tried, so that a stopped run goes on: one JSON line a bug, under a line that names the settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from thunder_rollout.tasks.rows import row_from_task, task_from_row
from thunder_rollout.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What became of one bug; `task` if it was kept."""

    key: str
    outcome: str
    task: Task | None = None


class Journal:
    """Context manager. A journal of other `settings` is begun anew; a half-written last line is dropped."""

    def __init__(self, path: Path, settings: str) -> None:
        self._path = path
        self._settings = settings
        self._known: dict[str, Attempt] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Journal:
        lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []
        kept = lines[1:] if lines[:1] == [json.dumps(self._settings)] else []
        for line in kept:
            row = json.loads(line)
            task = task_from_row(row["task"], str(self._path)) if row["task"] else None
            self._known[row["key"]] = Attempt(key=row["key"], outcome=row["outcome"], task=task)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(f"{line}\n" for line in [json.dumps(self._settings), *kept]))
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, key: str) -> Attempt | None:
        return self._known.get(key)

    def note(self, attempt: Attempt) -> None:
        assert self._file is not None  # inside the context
        task = row_from_task(attempt.task) if attempt.task else None
        self._file.write(json.dumps({"key": attempt.key, "outcome": attempt.outcome, "task": task}) + "\n")
        self._file.flush()
