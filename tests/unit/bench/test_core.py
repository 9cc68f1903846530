"""The benchmark of the core drives a whole fleet, and its rows say what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thunder_rollout.bench.config import BenchCoreConfig
from thunder_rollout.bench.core import measure, run_bench_core
from thunder_rollout.core.config import POLICIES, SchedulerConfig
from thunder_rollout.errors import ConfigError

SMALL = {"num_events": 2000, "num_restarts": 3, "context_tokens": 2000, "shared_tokens": 400, "capacity_tokens": 16_000}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_event_of_a_fleet_is_timed(policy: str) -> None:
    rows = measure(BenchCoreConfig(scheduler=SchedulerConfig(policy=policy), **SMALL), 60, 4)
    counts = {row.event: row.count for row in rows}
    assert set(counts) == {
        "BackendDown", "BackendUp", "ProgramEnded", "Tick", "ToolEnded", "ToolStarted", "TurnEnded", "TurnRequested",
        "TurnStarted", "WeightsUpdated", "WeightsUpdating",
    }  # fmt: skip
    assert counts["BackendDown"] == counts["BackendUp"] == 3
    assert counts["WeightsUpdating"] == counts["WeightsUpdated"] == 1
    assert sum(counts.values()) == pytest.approx(2000, rel=0.1)
    assert all(0 < row.p50_us <= row.p99_us <= row.max_us for row in rows)


def test_the_file_has_a_row_for_each_size_and_event(tmp_path: Path) -> None:
    config = BenchCoreConfig(runs_dir=str(tmp_path), sizes=[[20, 2], [40, 3]], **SMALL)
    rows = run_bench_core(config)
    written = json.loads((tmp_path / "bench" / "bench_core.json").read_text())
    assert [(row["programs"], row["event"]) for row in written] == [(row.programs, row.event) for row in rows]
    assert {(row.programs, row.backends) for row in rows} == {(20, 2), (40, 3)}
    assert {"programs", "backends", "event", "p50_us", "p99_us", "rss_mb"} <= set(written[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("sizes", []), ("sizes", [[10]]), ("num_events", 0), ("shared_tokens", 20_000), ("capacity_tokens", 50_000)],
)
def test_what_cannot_be_measured_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        BenchCoreConfig(**{field: value})
