"""A sweep from its config to its files."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.bounds import CLAIRVOYANT, INFINITE_KV
from thunder_rollout.sim.cells import Score, scores
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.report import simulate
from thunder_rollout.sim.sweep import run_sweep

pytestmark = pytest.mark.slow

OVERRIDES = [
    "loads=[0.5,3]",
    "policies=[sticky,capped,thunder]",
    "sim_engine.capacity_tokens=25600",
    "num_backends=1",
    "cap_shares=[0.5,0.8]",
    "warmup_lives=0.5",
    "measure_lives=1",
    "num_processes=1",
    "plots=false",
]
PLOTS = importlib.util.find_spec("matplotlib") is not None


def config(*overrides: str) -> SimulateConfig:
    return to_typed(SimulateConfig, compose_config("simulate", [*OVERRIDES, *overrides]))


@pytest.fixture(scope="module")
def result() -> list[Score]:
    return scores(run_sweep(config()))


def test_every_cell_has_a_row_beside_its_bounds(result: list[Score]) -> None:
    assert [(score.row.load, score.row.policy) for score in result] == [
        (load, policy) for load in (0.5, 3.0) for policy in ("sticky", "capped", "thunder", INFINITE_KV, CLAIRVOYANT)
    ]


def test_no_policy_passes_its_bound(result: list[Score]) -> None:
    for score in result:
        assert score.bound_share is not None
        assert score.hit_share is not None
        if score.row.policy not in (INFINITE_KV, CLAIRVOYANT):
            assert score.bound_share < 1.05, score.row
            assert score.hit_share < 1.02


def test_the_clairvoyant_schedule_is_a_strong_reference(result: list[Score]) -> None:
    shares = {(score.row.load, score.row.policy): score.clairvoyant_share for score in result}
    for policy in ("sticky", "capped", "thunder"):
        assert shares[3.0, policy] < 1.1


def test_capped_is_tuned(result: list[Score]) -> None:
    steps = {score.row.policy: score.row.result.steps_per_min for score in result if score.row.load == 3.0}
    assert steps["capped"] > steps["sticky"]


def test_processes_change_nothing() -> None:
    small = config("loads=[1]", "policies=[sticky]", "bounds=[]")
    alone, spread = run_sweep(small), run_sweep(replace(small, num_processes=2))
    assert [row.result for row in alone] == [row.result for row in spread]


def test_files_and_table(tmp_path: Path) -> None:
    quick = replace(config("loads=[1,2]", "policies=[sticky]", "seeds=[0,1]", "measure_lives=0.5"), plots=PLOTS)
    console = Console(record=True, width=200)
    simulate(quick, tmp_path, console)
    rows = list(csv.DictReader((tmp_path / "sim.csv").open()))
    assert len(rows) == 2 * 2 * 3
    assert float(rows[0]["steps_per_min"]) > 0
    assert "clairvoyant" in console.export_text()
    if PLOTS:
        assert {path.name for path in tmp_path.glob("*.png")} == {
            f"short_tools-{plot}.png" for plot in ("load", "cost", "usage", "waits")
        }


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("workloads=[nothing]", "workloads"),
        ("policies=[best]", "policies"),
        ("bounds=[sky]", "bounds"),
        ("loads=[0]", "loads"),
        ("sim_engine.max_running=4096", "max_running"),
        ("sim_engine.step_s=0", "step_s"),
        ("num_backends=0", "num_backends"),
    ],
)
def test_bad_settings_name_their_field(override: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        config(override)
