"""The recipes on the simulator run, and conclude what their numbers say."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"


def load(recipe: str, script: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", RECIPES / recipe / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_paper_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    reproduce = load("reproduce_paper", "reproduce.py", monkeypatch)
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


def test_a_simulator_that_is_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = load("validate_simulator", "validate.py", monkeypatch)
    cells = [
        validate.Compared(4.0, "sticky", (100.0, 110.0, 105.0), 112.0),
        validate.Compared(4.0, "thunder", (200.0, 190.0, 210.0), 150.0),
        validate.Compared(4.0, "capped", (205.0, 220.0), 140.0),
        validate.Compared(2.0, "sticky", (300.0,), 300.0),
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
    validate = load("validate_simulator", "validate.py", monkeypatch)
    rows = [
        {"load": 0.5, "policy": policy, "steps_per_min": 1000.0, "max_programs": 8 if policy == "capped" else None}
        for policy in ("sticky", "capped")
    ]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(rows))
    out = tmp_path / "table.md"
    windows = ["--warmup-s", "2", "--measure-s", "4"]
    monkeypatch.setattr(sys, "argv", ["validate.py", "--bench", str(bench), "--out", str(out), *windows])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tolerance", "1e-9"])
    assert validate.main() == 1, "1000 steps/min were made up"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tolerance", "1e9"])
    assert validate.main() == 0
    assert "| 0.5 | capped |" in out.read_text()
