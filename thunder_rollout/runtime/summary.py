"""`summary.json`: totals over the finished samples of a run folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from thunder_rollout.runtime.store import RunStore, SampleKey

_COLUMNS = ["instance_id", "resolved", "reward", "num_turns", "end_reason", "turns", "sandbox_backend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTotals:
    """What the parquet files can't tell: this session's own clock and failures.

    `rollout_s` is from the first sample's start to the last one's end, engines already up;
    `wall_s` the whole command.
    """

    expected: list[SampleKey]
    num_turns: int
    rollout_s: float
    wall_s: float
    failures: Counter[str]
    num_stale: int
    sandbox_backend: str


def summarise(store: RunStore, session: SessionTotals) -> dict[str, Any]:
    """Read every finished sample again and add up; the rates per minute are this session's."""
    rows = store.read_columns(_COLUMNS)
    turns = [turn for row in rows for turn in row["turns"]]
    prompt_tokens = sum(turn["prompt_tokens"] for turn in turns)
    num_resolved = sum(row["resolved"] for row in rows)
    return {
        "num_samples": len(rows),
        "num_expected": len(session.expected),
        "complete": store.finished() >= set(session.expected),
        "num_resolved": num_resolved,
        "resolved_rate": num_resolved / len(rows) if rows else 0.0,
        "reward_mean": sum(row["reward"] for row in rows) / len(rows) if rows else 0.0,
        "num_turns": len(turns),
        "steps_per_min": 60 * session.num_turns / session.rollout_s if session.rollout_s > 0 else 0.0,
        "kv_hit_rate": sum(turn["cached_tokens"] for turn in turns) / prompt_tokens if prompt_tokens else 0.0,
        "output_tokens": sum(turn["output_tokens"] for turn in turns),
        "queue_s": sum(turn["queue_s"] for turn in turns),
        "engine_s": sum(turn["engine_s"] for turn in turns),
        "tool_s": sum(turn["tool_s"] for turn in turns),
        "end_reasons": dict(Counter(row["end_reason"] for row in rows)),
        "sandbox_backend": session.sandbox_backend,
        "rollout_s": session.rollout_s,
        "wall_s": session.wall_s,
        "num_stale": session.num_stale,
        "failures": dict(session.failures),
    }
