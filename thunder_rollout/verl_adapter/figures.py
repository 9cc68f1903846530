"""Figures of a batch for verl's logger: verl's own names for its own, ours under `thunder/`.

`timing_s/agent_loop/...` is what verl's V0 manager computes and its V1 trainers do not log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_VERLS = ("num_preempted", "generate_sequences", "tool_calls", "compute_score")
_SPREAD = ("turns", "held_s", "engine_s", "tool_s", "sandbox_wait_s", "grade_s", "output_tokens")
_END = "end/"


def agent_loop_timing(metrics: Sequence[Mapping[str, float]], tags: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`metrics` are the rows' `AgentLoopMetrics`, `tags` what verl keeps of their lengths."""
    if not metrics:
        return {}
    values: dict[str, float] = {}
    for name in _VERLS:
        values |= _spread(f"timing_s/agent_loop/{name}", [float(row.get(name, 0.0)) for row in metrics])
    took_s = [sum(row.get(name, 0.0) for name in _VERLS[1:]) for row in metrics]
    slowest = max(range(len(metrics)), key=took_s.__getitem__)
    values |= {f"timing_s/agent_loop/slowest/{name}": float(metrics[slowest].get(name, 0.0)) for name in _VERLS}
    values["timing_s/agent_loop/slowest/prompt_length"] = float(tags[slowest]["prompt_len"])
    values["timing_s/agent_loop/slowest/response_length"] = float(tags[slowest]["response_len"])
    return values


def thunder_figures(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, float]:
    """`rows` are `extra_fields.thunder` of each, None for another loop's. Shares are of the rows that were
    played."""
    played = [row for row in rows if row and "turns" in row]
    if not played:
        return {}
    values: dict[str, float] = {}
    for name in _SPREAD:
        values |= _spread(f"thunder/{name}", [float(row[name]) for row in played])
    prompt_tokens = sum(row["prompt_tokens"] for row in played)
    values["thunder/kv_hit_rate"] = (
        sum(row["cached_tokens"] for row in played) / prompt_tokens if prompt_tokens else 0.0
    )
    values["thunder/attempts/mean"] = sum(row["attempts"] for row in played) / len(played)
    values["thunder/masked"] = sum(row["masked"] for row in played) / len(played)
    ends = Counter(name for row in played for name in row if name.startswith(_END))
    values |= {f"thunder/{name}": count / len(played) for name, count in ends.items()}
    return values


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}/min": min(values), f"{name}/max": max(values), f"{name}/mean": sum(values) / len(values)}
