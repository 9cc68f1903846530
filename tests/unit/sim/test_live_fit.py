"""A profile is scaled to live runs, by the rows of one policy alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from thunder_rollout.config import compose_config, to_typed
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.config import SimulateConfig
from thunder_rollout.sim.live_fit import LiveCell, read_bench, scale, scale_to_bench, simulated


def config(seed: int) -> SimulateConfig:
    return replace(
        to_typed(SimulateConfig, compose_config("simulate", ["sim_engine.capacity_tokens=25600"])),
        seeds=[seed],
        warmup_lives=0.3,
        measure_lives=0.5,
    )


def cell(load: float, policy: str = "sticky", steps_per_min: float = 1.0) -> LiveCell:
    """As `config` has it: 8 programs fill 25,600 tokens twice."""
    num_programs = round(16.1 * load)
    return LiveCell("short_tools", load, policy, (steps_per_min,), num_programs, None)


@pytest.mark.slow
def test_what_slowed_the_live_engines_is_found() -> None:
    slow = replace(config(0), sim_engine=scale(config(0).sim_engine, others=1.5, prefill=2.0))
    live = [replace(cell(load), steps_per_min=(simulated(cell(load), slow),)) for load in (0.5, 1.0, 2.0, 4.0)]
    live.append(cell(4.0, "thunder"))  # a made-up row of another policy changes nothing
    found = scale_to_bench(live, config(0))
    start = config(0).sim_engine
    assert found.decode_turn_s / start.decode_turn_s == pytest.approx(1.5, rel=0.15)
    assert found.prefill_token_s / start.prefill_token_s == pytest.approx(2.0, rel=0.15)
    assert "4 live sticky cells" in found.source


def test_another_fleet_than_the_live_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="had 99 programs, simulated are 16"):
        simulated(replace(cell(1.0), num_programs=99), config(0))


def test_one_load_does_not_tell_two_factors() -> None:
    with pytest.raises(ConfigError, match="two are needed"):
        scale_to_bench([cell(1.0), cell(2.0, "thunder")], config(0))


def row(seed: int, steps_per_min: float) -> dict[str, object]:
    return {
        "workload": "short_tools", "policy": "sticky", "load": 1.0, "seed": seed, "steps_per_min": steps_per_min,
        "num_programs": 16, "model": "qwen2_3m",
    }  # fmt: skip


def test_repetitions_are_one_cell(tmp_path: Path) -> None:
    others = [{**row(0, 5.0), "workload": "groups"}, {**row(0, 5.0), "model": "qwen2_26m"}]  # not simulated
    (tmp_path / "bench.json").write_text(json.dumps([row(0, 90.0), row(1, 100.0), row(2, 140.0), *others]))
    (read,) = read_bench(tmp_path / "bench.json")
    assert read == LiveCell("short_tools", 1.0, "sticky", (90.0, 100.0, 140.0), 16, None)
    assert read.median == 100.0


@pytest.mark.parametrize("text", ["", "[{}]", json.dumps([{**row(0, 1.0), "workload": "mine"}])])
def test_a_file_that_is_no_bench_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(ConfigError, match="bench="):
        read_bench(tmp_path / "bench.json")
