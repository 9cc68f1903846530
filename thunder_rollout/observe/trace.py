"""`trace.jsonl`: every event and the decisions it led to, enough to replay a run.

One line an event: `{"t": seconds, "event": name, ...fields, "decisions": [{"decision": name,
...}]}`. `t` is the scheduler's own clock (seconds since the scheduler started).
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from thunder_rollout.core import decisions as decision_types
from thunder_rollout.core import events as event_types
from thunder_rollout.core.decisions import Decision
from thunder_rollout.core.events import Event


class TraceWriter:
    """Appends to a trace file; a resumed run goes on in the same file after a `Resumed` line."""

    def __init__(self, path: Path) -> None:
        resumed = path.exists()
        self._file = path.open("a", buffering=1 << 16)
        if resumed:  # the line feed ends a line that a killed run may have left torn
            self._file.write("\n" + json.dumps({"t": 0.0, "event": "Resumed", "decisions": []}) + "\n")

    def write(self, now: float, event: Event, decisions: list[Decision]) -> None:
        line = {"t": now, **_flat("event", event), "decisions": [_flat("decision", d) for d in decisions]}
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_trace(path: Path) -> list[tuple[float, Event, list[Decision]]]:
    """The last session of a trace, as it was handled; torn lines (of a killed run) are dropped."""
    entries: list[tuple[float, Event, list[Decision]]] = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["event"] == "Resumed":
            entries.clear()
            continue
        decisions = [_build(decision_types, d, "decision") for d in row.pop("decisions")]
        entries.append((row.pop("t"), _build(event_types, row, "event"), decisions))
    return entries


def _flat(key: str, item: Event | Decision) -> dict[str, Any]:
    values = ((f.name, getattr(item, f.name), f.default) for f in fields(item))
    return {key: type(item).__name__, **{name: value for name, value, default in values if value != default}}


def _build(module: Any, row: dict[str, Any], key: str) -> Any:
    row = dict(row)
    cls = getattr(module, row.pop(key))
    if "finish_reason" in row:
        row["finish_reason"] = event_types.FinishReason(row["finish_reason"])
    if cls is decision_types.Expire and "reason" in row:
        row["reason"] = decision_types.ExpiryReason(row["reason"])
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
