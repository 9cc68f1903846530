"""The recipes on the simulator run, and conclude what their numbers say."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.recipes import load_recipe
from thunder_rollout.bench.intervals import Interval
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.live_fit import LiveCell


@pytest.mark.slow
def test_the_paper_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    reproduce = load_recipe("reproduce_paper", "reproduce.py")
    small = ["warmup_lives=0.3", "measure_lives=0.4", "num_processes=1"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--out", str(tmp_path), *small])
    reproduce.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "figure 4, coding (mini-SWE-agent)" in text
    assert "dt = 5 s" in text
    assert "x = 2" in text
    assert (tmp_path / "figure4.png").stat().st_size > 1000
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4, "two loads, four policies"


def live(load: float, policy: str, *steps_per_min: float) -> LiveCell:
    return LiveCell("short_tools", load, policy, steps_per_min, 16, None)


def test_a_simulator_that_is_off_is_told() -> None:
    validate = load_recipe("validate_simulator", "validate.py")
    cells = [
        validate.Compared(live(4.0, "sticky", 100.0, 110.0, 105.0), 112.0),
        validate.Compared(live(4.0, "thunder", 200.0, 190.0, 210.0), 150.0),
        validate.Compared(live(4.0, "capped", 205.0, 220.0), 140.0),
        validate.Compared(live(2.0, "sticky", 300.0), 300.0),
    ]
    assert cells[0].ratio == pytest.approx(112 / 105)
    assert validate.wrong_order(cells) == [], "thunder and capped overlap live"
    swapped = [replace(cells[0], simulated=160.0), cells[1]]
    assert validate.wrong_order(swapped) == [(swapped[0], swapped[1])]
    text = validate.table(swapped, validate.wrong_order(swapped), 0.15)
    assert "| 4 | thunder | 200 (190 to 210) | 150 | 0.75 (!) |" in text
    assert "sticky < thunder live, not simulated" in text


@pytest.mark.slow
def test_the_bench_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = load_recipe("validate_simulator", "validate.py")
    windows = {
        "workload": "short_tools", "load": 0.5, "model": "qwen2_3m", "steps_per_min": 1000.0, "num_programs": 16,
    }  # fmt: skip
    rows = [
        {**windows, "policy": policy, "max_programs": 8 if policy == "capped" else None}
        for policy in ("sticky", "capped")
    ]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(rows))
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["validate.py", "--bench", str(bench), "--out", str(out), "--tolerance", "1e-9"])
    assert validate.main() == 1, "1000 steps/min were made up"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tolerance", "1e9"])
    assert validate.main() == 0
    assert "| 0.5 | capped |" in out.read_text()


def sim_row(
    policy: str, load: float, seed: int, steps_per_min: float, share: float = 0.7, hits: float = 0.98
) -> dict[str, object]:
    return {
        "workload": "short_tools", "load": load, "policy": policy, "seed": seed, "steps_per_min": steps_per_min,
        "bound_share": share, "hit_share": hits, "clairvoyant_share": "",
    }  # fmt: skip


def test_a_missed_target_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = load_recipe("compare_policies", "compare.py")
    rows = [
        *(sim_row("adaptive", 1.0, seed, 100.0 + 10 * seed, 0.7 + 0.1 * seed) for seed in range(3)),
        *(sim_row("thunder", 1.0, seed, 100.0) for seed in range(3)),
        *(sim_row("infinite_kv", 1.0, seed, 200.0) for seed in range(3)),
        sim_row("adaptive", 4.0, 0, 90.0, 0.6, 0.8), sim_row("thunder", 4.0, 0, 60.0), sim_row("capped", 4.0, 0, 95.0),
        sim_row("infinite_kv", 4.0, 0, 100.0),
    ]  # fmt: skip
    path = tmp_path / "sim.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    samples = compare.read([path])
    good, bad = compare.compare(samples)
    assert (good.best_other, good.of_best, good.missed) == ("thunder", pytest.approx(1.1), [])
    assert good.over_thunder == Interval(pytest.approx(1.1), pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3))
    assert good.of_bound == pytest.approx(0.8)
    assert good.of_clairvoyant is None
    assert bad.best_other == "capped"
    assert bad.missed == ["0.95 of capped", "0.82 of the best peak", "hits 0.80 of infinite KV"]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), "--out", str(tmp_path / "table.md")])
    assert compare.main() == 1
    assert compare.margins(samples)["short_tools"].mean == pytest.approx(1.5**0.5), "of the seed that both loads have"
    with pytest.raises(ConfigError, match="read before"):
        compare.read([path, path])
    assert "missed: short_tools at 4: 0.95 of capped" in (tmp_path / "table.md").read_text()
