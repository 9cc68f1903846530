"""The bench on a real Ray cluster with engines that have no model: engines replaced, weights updated, report."""

from __future__ import annotations

from pathlib import Path

from tests.support import cli
from thunder_rollout.bench.store import read_rows

ARGS = (
    "bench",
    "plan=full",
    "workloads=[weight_updates,uneven_engines]",
    "policies=[adaptive]",
    "seeds=[0]",
    "warmup_s=1",
    "measure_s=8",
    "workload.weight_updates.weight_update_s=4",
    "engine.kind=fake",
    "ray.num_cpus=4",
)


def test_a_bench_leaves_rows_and_a_report(tmp_path: Path):
    code, output = cli.run(tmp_path, *ARGS)
    assert code == 0, output
    folder = tmp_path / "runs" / "bench_full"
    updates, uneven = read_rows(folder / "bench.json")
    assert updates.num_weight_updates >= 1
    assert uneven.kv_tokens == [51_200, 25_600]
    assert min(updates.num_turns, uneven.num_turns) > 0
    assert "### uneven_engines, qwen2_3m" in (folder / "report.md").read_text()
    assert "### What a lost cache costs" in (folder / "report.md").read_text()
    assert (folder / "ratios.png").exists() is False, "one policy alone has no ratio"
    code, output = cli.run(tmp_path, "bench-report", "plan=full")
    assert code == 0, output
    assert "uneven_engines" in output
