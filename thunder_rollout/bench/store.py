"""bench.json: one row a finished cell, on disk before the next begins.

A run that was stopped goes on: rows of the present plan stay and their cells aren't measured again; so do the rows
of cells that this run leaves out (`workloads`, `policies`, `loads`, `seeds`). Rows of another plan or other settings
never mix with them, and what a run was to measure and finds measured it measures anew; such rows are added to
bench.previous.json, which nothing removes.

Settings are what the configuration says. That the code changed between two rows a row tells only for the scheduler's
core (`CellResult.core`); the report says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from thunder_rollout.bench.cell import CellResult
from thunder_rollout.bench.plan import CellKey, CellPlan
from thunder_rollout.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = "bench.json"
PREVIOUS = "bench.previous.json"


class RowStore:
    """`kinds` are those of the whole plan, of which a run may leave out some."""

    def __init__(self, folder: Path, kinds: Collection[CellKey]) -> None:
        self._path = folder / FILE
        self._previous = folder / PREVIOUS
        self._kinds = kinds
        self.rows: list[CellResult] = []

    def resume(self, plans: Sequence[CellPlan]) -> list[CellPlan]:
        """What of `plans` is still to be measured."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = read_rows(self._path) if self._path.exists() else []
        wanted = {plan.key for plan in plans}
        done = wanted & {row.key for row in found}
        if done == wanted:
            done = set()
        self.rows = [row for row in found if row.key in done or (row.key not in wanted and row.key.kind in self._kinds)]
        if len(self.rows) < len(found):
            old = _read(self._previous) if self._previous.exists() else []
            _write(self._previous, old + [asdict(row) for row in found if row not in self.rows])
            _write(self._path, [asdict(row) for row in self.rows])
            logger.info("%d rows of an earlier run are now in %s", len(found) - len(self.rows), PREVIOUS)
        if done:
            logger.info("%d of %d cells are measured already", len(done), len(plans))
        return [plan for plan in plans if plan.key not in done]

    def add(self, row: CellResult) -> None:
        self.rows.append(row)
        _write(self._path, [asdict(row) for row in self.rows])


def read_rows(path: Path) -> list[CellResult]:
    """Raises `ConfigError` for a file that `thunder-rollout bench` of this version did not write."""
    raw = _read(path)
    known = {f.name for f in fields(CellResult)}
    required = {f.name for f in fields(CellResult) if f.default is MISSING}
    if any(not required <= row.keys() <= known for row in raw):
        raise ConfigError(f"{path}: was written by another version; remove it or move it away")
    return [CellResult(**row) for row in raw]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        raw: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}; run `thunder-rollout bench` first, or remove the file") from None
    return raw


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(rows, indent=2) + "\n")
    scratch.replace(path)
