"""A run that is killed goes on; rows are on disk one by one and never mix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from thunder_rollout.bench.cell import CellResult, run_cell
from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.plan import CellPlan, planned_cells, whole_plan
from thunder_rollout.bench.rehearsal import VOCAB_SIZE, stage
from thunder_rollout.bench.runner import run_cells
from thunder_rollout.bench.source import core_digest
from thunder_rollout.bench.store import RowStore, read_rows
from thunder_rollout.bench.workload import random_positions
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.errors import ConfigError, EngineDied

pytestmark = pytest.mark.slow


class Killed(BaseException):
    pass


class FakeMeasurer:
    """Cells on engines without a model. `failing` cells raise so often; at cell `kill_at` the process dies."""

    def __init__(self, kill_at: int | None = None, failing: dict[int, int] | None = None) -> None:
        self.measured: list[CellPlan] = []
        self.num_releases = 0
        self._kill_at = kill_at
        self._failing = failing or {}

    async def measure(self, plan: CellPlan) -> CellResult:
        number = len(self.measured)
        if self._failing.get(number, 0) > 0:
            self._failing[number] -= 1
            raise EngineDied("killed by a test")
        start = random_positions(plan.workload, seed=plan.key.seed, num_slots=plan.num_programs)
        async with stage(plan) as (scheduler, engines):
            if number == self._kill_at:
                raise Killed
            self.measured.append(plan)
            return await run_cell(
                plan, start, scheduler, engines, capacities=dict.fromkeys(engines, 16_384), vocab_size=VOCAB_SIZE
            )

    async def release(self) -> None:
        self.num_releases += 1


def run(config: BenchConfig, measurer: FakeMeasurer) -> tuple[list[CellPlan], Path]:
    folder = Path(config.runs_dir) / config.plan.name
    store = RowStore(folder, whole_plan(config))
    return run_in_virtual_time(run_cells(planned_cells(config), store, measurer)), folder


@pytest.fixture
def small(config: BenchConfig) -> BenchConfig:
    return replace(config, loads=[0.5], warmup_s=1.0, measure_s=2.0)


def test_a_run_killed_in_mid_cell_goes_on_with_that_cell(small):
    with pytest.raises(Killed):
        run(small, FakeMeasurer(kill_at=2))
    second = FakeMeasurer()
    failed, folder = run(small, second)
    plans = planned_cells(small)
    assert failed == []
    assert second.measured == plans[2:]
    assert [row.key for row in read_rows(folder / "bench.json")] == [plan.key for plan in plans]
    assert second.num_releases == 1


def test_a_finished_run_begins_anew_and_keeps_the_old_rows(small):
    run(small, FakeMeasurer())
    again = FakeMeasurer()
    _, folder = run(small, again)
    assert again.measured == planned_cells(small)
    assert len(read_rows(folder / "bench.previous.json")) == len(again.measured)


def test_rows_of_other_settings_never_mix(small):
    with pytest.raises(Killed):
        run(small, FakeMeasurer(kill_at=2))
    changed = replace(small, measure_s=3.0)
    measurer = FakeMeasurer()
    _, folder = run(changed, measurer)
    assert measurer.measured == planned_cells(changed)
    assert {row.measure_s for row in read_rows(folder / "bench.json")} == {3.0}
    assert {row.measure_s for row in read_rows(folder / "bench.previous.json")} == {2.0}


def test_a_narrowed_run_leaves_the_other_rows_and_the_whole_one_goes_on_from_them(small):
    run(small, FakeMeasurer(kill_at=None))
    whole = replace(small, loads=[0.5, 3.0])
    with pytest.raises(Killed):
        run(whole, FakeMeasurer(kill_at=1))
    _, folder = run(whole, FakeMeasurer())
    before = read_rows(folder / "bench.json")
    assert len(before) == len(planned_cells(whole)) == 8

    again = FakeMeasurer()
    run(replace(whole, policies=["thunder"], loads=[3.0], seeds=[0]), again)
    run(replace(whole, policies=["thunder"], loads=[3.0], seeds=[1]), again)
    assert len(again.measured) == 2
    after = read_rows(folder / "bench.json")
    assert {row.key for row in after} == {row.key for row in before}
    narrowed = [row.key for row in read_rows(folder / "bench.previous.json")][-2:]
    assert narrowed == [plan.key for plan in again.measured], "both, and what was there before them"

    run(replace(whole, loads=[3.0], seeds=[2]), FakeMeasurer())
    more = FakeMeasurer()
    run(replace(whole, seeds=[0, 1, 2]), more)
    assert {(plan.key.load, plan.key.seed) for plan in more.measured} == {(0.5, 2)}


def test_what_is_put_aside_is_never_lost(small):
    for measure_s in (2.0, 3.0, 2.0, 3.0):
        _, folder = run(replace(small, measure_s=measure_s), FakeMeasurer())
    assert [row.measure_s for row in read_rows(folder / "bench.previous.json")] == [2.0] * 4 + [3.0] * 4 + [2.0] * 4
    assert {row.measure_s for row in read_rows(folder / "bench.json")} == {3.0}


def test_rows_from_before_a_field_was_recorded_are_read_and_gone_on_from(small):
    _, folder = run(small, FakeMeasurer())
    raw = json.loads((folder / "bench.json").read_text())
    assert raw[0].pop("core") == core_digest()
    (folder / "bench.json").write_text(json.dumps(raw[:1]))
    measurer = FakeMeasurer()
    run(small, measurer)
    assert measurer.measured == planned_cells(small)[1:]
    assert [row.core for row in read_rows(folder / "bench.json")] == [None, *[core_digest()] * 3]


def test_more_seeds_go_on_from_the_rows_there_are(small):
    run(small, FakeMeasurer())
    more = FakeMeasurer()
    run(replace(small, seeds=[0, 1, 2]), more)
    assert {plan.key.seed for plan in more.measured} == {2}


def test_a_cell_that_fails_is_tried_on_new_engines_then_left_for_the_next_run(small):
    once = FakeMeasurer(failing={0: 1})
    failed, _ = run(small, once)
    assert failed == []
    assert once.num_releases == 2
    measurer = FakeMeasurer(failing={1: 2})
    failed, _ = run(replace(small, measure_s=3.0), measurer)
    assert failed == [planned_cells(replace(small, measure_s=3.0))[1]]
    rest = FakeMeasurer()
    assert run(replace(small, measure_s=3.0), rest)[0] == []
    assert rest.measured == failed


def test_a_file_of_another_version_is_refused(small):
    folder = Path(small.runs_dir) / "bench"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps([{"workload": "short_tools"}]))
    with pytest.raises(ConfigError, match="another version"):
        run(small, FakeMeasurer())
