"""What is concluded from rows: intervals, ratios paired by seed, and everything a reader is given."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from thunder_rollout.bench.cell import CellResult
from thunder_rollout.bench.intervals import interval, paired_ratio
from thunder_rollout.bench.report import summaries, write_report

ROW = CellResult(
    workload="short_tools", policy="adaptive", load=4.0, seed=0, num_programs=129, num_turns=100, steps_per_min=300.0,
    kv_hit_rate=0.76, turn_latency_p50_s=3.0, turn_latency_p95_s=9.0, imbalance=0.1,
    cost_shares={"decode": 0.5, "prefill": 0.1, "recompute": 0.1, "unused": 0.2, "caching": 0.1}, warmup_s=7.0,
    measure_s=18.0, max_programs=None, model="qwen2_3m", settings="abc", kv_tokens=[51200, 51200], num_ended=8,
    num_weight_updates=0, infinite_kv_hit_rate=0.8, recomputed_tokens=1000, wait_p95_s=2.0, longest_wait_s=70.0,
    num_waits_past_rule=0, driver_cpu_share=0.2, drift_p95=0.012,
)  # fmt: skip


def rows() -> list[CellResult]:
    found = [replace(ROW, seed=seed, steps_per_min=steps) for seed, steps in enumerate((300.0, 330.0, 315.0))]
    found += [
        replace(ROW, policy="thunder", seed=seed, steps_per_min=steps)
        for seed, steps in enumerate((300.0, 300.0, 300.0))
    ]
    found.append(replace(ROW, policy="capped", seed=0, steps_per_min=250.0, max_programs=18))
    found.append(replace(ROW, workload="groups", steps_per_min=100.0, load=0.5))
    return found


def test_intervals_are_student_s():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert (found.low, found.high) == (pytest.approx(2.0 - found.half_width), pytest.approx(2.0 + found.half_width))
    assert math.isnan(interval([1.0]).half_width)
    assert str(interval([1.0])) == "1.00"
    assert interval([0.0] * 10 + [1.0] * 11).half_width == pytest.approx(2.086 * 0.5118 / math.sqrt(21), rel=1e-3)


def test_ratios_are_paired_by_seed():
    ratio = paired_ratio({0: 2.0, 1: 6.0, 5: 9.0}, {0: 1.0, 1: 2.0, 7: 1.0})
    assert ratio is not None
    assert ratio.mean == 2.5
    assert paired_ratio({0: 1.0}, {1: 1.0}) is None


def test_policies_are_summed_up_by_workload_and_load():
    ours, thunder, capped, groups = summaries(rows())
    assert (ours.first.policy, ours.over, ours.steps_per_min.mean) == ("adaptive", None, 315.0)
    assert ours.of_infinite_kv == pytest.approx(0.95)
    assert str(thunder.over) == "1.05 ± 0.12"
    assert str(capped.over) == "1.20"
    assert groups.first.workload == "groups"


def test_the_report_can_be_quoted(tmp_path: Path):
    (tmp_path / "bench.json").write_text(json.dumps([asdict(row) for row in rows()]))
    cost = {
        "model": "qwen2_3m", "context_tokens": 3180, "output_tokens": 60, "num_together": 15, "prefill_s": 0.4,
        "decode_share_s": 0.1,
    }  # fmt: skip
    (tmp_path / "prefill_cost.json").write_text(json.dumps([cost]))
    out = StringIO()
    write_report(tmp_path, console=Console(file=out))
    text = (tmp_path / "report.md").read_text()
    assert "| workload | model | load | adaptive, steps/min | / thunder | / capped | KV hits of infinite KV |" in text
    assert "| `short_tools` | qwen2_3m | 4 | 315 ± 37 | 1.05 ± 0.12 | 1.20 | 0.95 |" in text
    assert "| `groups` | qwen2_3m | 0.5 | 100 |  |  | 0.95 |" in text
    assert "### short_tools, qwen2_3m" in text
    assert "| 4 | 129 | thunder | 300 ± 0 | 1.05 ± 0.12 |" in text
    assert "| 4 | 129 | capped (18) | 250 | 1.20 |" in text
    assert "- Load 4: adaptive does 1.05 of the best other's mean (thunder) and 1.00 of the best peak" in text
    assert "its hits are 0.95 of those of infinite KV" in text
    assert "takes an engine 0.40 s, 4.0 times a turn's share of decoding" in text
    assert "thunder" in out.getvalue()
    with (tmp_path / "bench.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows())
    assert table[0]["cost_unused"] == "0.2"
    for name in ("short_tools-qwen2_3m-load", "short_tools-qwen2_3m-cost", "groups-qwen2_3m-load", "ratios"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_who_waited_past_the_rule_is_told(tmp_path: Path):
    (tmp_path / "bench.json").write_text(json.dumps([asdict(replace(ROW, num_waits_past_rule=2))]))
    write_report(tmp_path, plots=False, console=Console(file=StringIO()))
    assert "| 70 (2 past the rule) |" in (tmp_path / "report.md").read_text()


def test_rows_of_several_schedulers_are_told_from_rows_of_one(tmp_path: Path):
    def report(*cores: str | None) -> str:
        found = [replace(ROW, seed=seed, core=core) for seed, core in enumerate(cores)]
        (tmp_path / "bench.json").write_text(json.dumps([asdict(row) for row in found]))
        write_report(tmp_path, plots=False, console=Console(file=StringIO()))
        return (tmp_path / "report.md").read_text()

    assert "source changed" not in report(None, None)
    assert "source changed" not in report("a", "a")
    text = report(None, "a", "b", "b")
    assert "source changed between rows**: 1 by one that was not recorded, 1 by a, 2 by b" in text


def test_drift_is_told_where_it_was_measured(tmp_path: Path):
    found = [replace(ROW, seed=seed, drift_p95=drift) for seed, drift in enumerate((0.01, 0.022, None))]
    found.append(replace(ROW, policy="sticky", drift_p95=None))
    (tmp_path / "bench.json").write_text(json.dumps([asdict(row) for row in found]))
    write_report(tmp_path, plots=False, console=Console(file=StringIO()))
    ours, sticky = (line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| 4 "))
    assert "| 0.10 | 1.6% (to 2.2%) | 24 |" in ours
    assert "| 0.10 |  | 8 |" in sticky
    with (tmp_path / "bench.csv").open() as file:
        assert [row["drift_p95"] for row in csv.DictReader(file)] == ["0.01", "0.022", "", ""]


def test_nothing_measured_is_nothing_to_report(tmp_path: Path):
    (tmp_path / "bench.json").write_text("[]")
    write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()
