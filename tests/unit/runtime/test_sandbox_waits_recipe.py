"""What the recipe that measures waits for sandboxes reads out of a trace, and what it calls met."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.support.recipes import load_recipe
from thunder_rollout.core.decisions import PrepareSandbox, Restore
from thunder_rollout.core.events import SandboxReady, Tick


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("sandbox_waits", "sandbox_waits.py")


def trace(*times: tuple[float, float]):
    """Of programs with a sandbox that was ready, and a turn that was granted, at these times."""
    entries = []
    for number, (ready_s, granted_s) in enumerate(times):
        name = f"p{number}"
        restore = Restore(program=name, backend="e", generation=0, request="r", grant=number)
        entries.append((0.0, Tick(), [PrepareSandbox(program=name, by_s=0.0)]))
        entries.append((ready_s, SandboxReady(program=name, took_s=2.0), []))
        entries.append((granted_s, Tick(), [restore]))
    return sorted(entries, key=lambda entry: entry[0])


def test_waits_are_those_of_grants_in_the_window(recipe: ModuleType) -> None:
    waits = recipe.waits_of(trace((3.0, 1.0), (7.0, 5.0), (4.0, 9.0)), since_s=5.0)
    assert [(wait.wait_s, wait.idle_s) for wait in waits] == [(2.0, 0.0), (0.0, 5.0)]


@pytest.mark.parametrize(("waits_s", "is_met"), [([0.0] * 19 + [9.0], True), ([0.0] * 18 + [0.3] * 2, False)])
def test_the_target_is_a_tenth_of_a_start_at_p95(recipe: ModuleType, waits_s: list[float], is_met: bool) -> None:
    record = recipe.Record(began_at=0.0)
    record.turn_ended()
    waits = recipe.waits_of(trace(*((10.0 + wait_s, 10.0) for wait_s in waits_s)), since_s=0.0)
    row = recipe.row_of("ahead of it", waits, record, window_s=30.0)
    assert (row.num_programs, row.start_s, row.steps_per_min) == (20, 2.0, 2.0)
    assert row.is_met == is_met
    assert f"| {row.wait_max_s:.2f} | 0.0 | 0.00 | 2 |" in recipe.table([row])
