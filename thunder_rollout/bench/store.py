"""bench.json: one row a finished cell, on disk before the next begins.

A run that was stopped goes on: rows of the present plan stay and their cells aren't measured again. Rows of
another plan or other settings never mix with them, and a plan that is finished begins anew; what was there
before is then kept as bench.previous.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from thunder_rollout.bench.cell import CellResult
from thunder_rollout.bench.plan import CellPlan
from thunder_rollout.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = "bench.json"
PREVIOUS = "bench.previous.json"


class RowStore:
    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.rows: list[CellResult] = []

    def resume(self, plans: Sequence[CellPlan]) -> list[CellPlan]:
        """What of `plans` is still to be measured; the rows there are of the others."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = read_rows(self._path) if self._path.exists() else []
        wanted = {plan.key for plan in plans}
        rows = [row for row in found if row.key in wanted]
        if len(rows) == len(wanted):
            rows = []
        if len(rows) < len(found):
            self._path.replace(self._path.with_name(PREVIOUS))
            logger.info("rows of an earlier run are now in %s", PREVIOUS)
        self.rows = rows
        done = {row.key for row in rows}
        if rows:
            logger.info("%d of %d cells are measured already", len(rows), len(plans))
            self._write()
        return [plan for plan in plans if plan.key not in done]

    def add(self, row: CellResult) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")
        scratch.replace(self._path)


def read_rows(path: Path) -> list[CellResult]:
    """Raises `ConfigError` for a file that `thunder-rollout bench` of this version did not write."""
    try:
        raw: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}; run `thunder-rollout bench` first, or remove the file") from None
    known = {f.name for f in fields(CellResult)}
    if any(row.keys() != known for row in raw):
        raise ConfigError(f"{path}: was written by another version; remove it or move it away")
    return [CellResult(**row) for row in raw]
