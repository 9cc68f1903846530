"""It always moves: whatever the policy, an idle backend admits the first program that it can hold."""

from __future__ import annotations

from thunder_rollout.core.config import SchedulerConfig, ThunderConfig
from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import (
    BackendUp,
    ProgramEnded,
    Tick,
    TurnRequested,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.harness import Harness
from thunder_rollout.core.liveness import MAX_MOVED
from thunder_rollout.core.policies.base import PolicyBase, ProgramView, View
from thunder_rollout.core.scheduler import Scheduler


def thunder(**capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy="thunder", max_wait_s=60.0), **capacity_tokens)


def who(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Restore)]


def test_a_program_that_leaves_no_headroom_still_runs_alone() -> None:
    shell = thunder(a=1000)
    assert who(shell.ask("p", 999)) == ["p"]


def test_an_idle_backend_admits_beyond_the_watermark_while_its_programs_act() -> None:
    shell = thunder(a=1000)
    shell.ask("p", 700)
    shell.ask("q", 500)
    assert who(shell.end("p")) == ["q"]


def test_an_idle_backend_admits_one_program_at_a_time() -> None:
    shell = thunder(a=1000)
    shell.ask("p", 800)
    for name in ("q", "r"):
        shell.ask(name, 800)
    assert who(shell.end("p")) == ["q"]
    assert who(shell.end("q")) == ["r"]


def test_programs_that_only_act_are_not_admitted_by_it() -> None:
    shell = thunder(a=1000)
    shell.ask("p", 500)
    shell.end("p")
    shell.ask("q", 300)
    shell.ask("q", 800)
    assert shell.tick(5) == [Pause(program="p", backend="a")]
    assert who(shell.send(ProgramEnded(program="q"))) == []


def test_a_program_that_outgrew_everything_but_one_backend_waits_for_that() -> None:
    shell = thunder(a=1000, b=5000)
    shell.ask("keeper", 800)
    shell.ask("p", 3000)
    shell.ask("q", 4000)
    assert who(shell.end("keeper")) == []  # `a` is idle but can't hold it
    assert who(shell.end("p")) == ["q"]


def test_a_marked_lone_program_comes_back_with_its_next_request() -> None:
    shell = Harness(SchedulerConfig(policy="thunder", thunder=ThunderConfig(headroom_tokens=100)), a=1000)
    shell.ask("p", 950)
    assert shell.tick(5) == []
    assert shell.end("p", 20) == [Pause(program="p", backend="a")]
    assert who(shell.ask("p", 980)) == ["p"]


def test_the_longest_waiting_goes_first_once_it_is_overdue() -> None:
    shell = thunder(a=1000)
    shell.ask("keeper", 900)
    shell.ask("long", 990)
    shell.now = 61.0
    shell.ask("short", 100)
    assert who(shell.send(ProgramEnded(program="keeper"))) == ["long"]


def test_the_emptiest_idle_backend_comes_first() -> None:
    shell = thunder()
    shell.ask("p", 100)
    shell.ask("q", 100)
    shell.ask("r", 100)
    assert who(shell.up("a", 1000)) == ["p"]
    assert who(shell.up("b", 1000)) == ["q"]
    assert who(shell.tick(5)) == ["r"]


def test_a_long_program_gets_its_turn_though_short_ones_keep_coming() -> None:
    shell = thunder(a=1000)
    waited_s: float | None = None
    shell.ask("old", 600)
    shell.ask("long", 880)
    for index in range(40):
        shell.ask(f"short{index}", 100)
        shell.tick(5)
        if waited_s is None and any(program == "long" for program, _ in shell.grants.values()):
            waited_s = shell.now
        oldest = next(iter(shell.grants.values()), None)
        if oldest is not None:
            shell.send(ProgramEnded(program=oldest[0]))
    assert waited_s is not None
    assert 60.0 < waited_s <= 120.0


class Silent(PolicyBase):
    """Never places anybody."""

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        return None


def test_a_fleet_that_is_idle_is_set_to_work_in_slices() -> None:
    scheduler = Scheduler(SchedulerConfig(), policy=Silent())
    names = tuple(f"b{number}" for number in range(2 * MAX_MOVED + 10))
    for name in names:
        scheduler.handle(BackendUp(backend=name, generation=0, capacity_tokens=1000, max_running=8), 0.0)
    scheduler.handle(WeightsUpdating(backends=names), 1.0)
    for number in range(len(names)):
        assert scheduler.handle(TurnRequested(program=f"p{number}", request="r", prompt_tokens=5), 2.0) == []
    slices = [who(scheduler.handle(event, 3.0)) for event in (WeightsUpdated(backends=names), Tick(), Tick(), Tick())]
    assert [len(moved) for moved in slices] == [MAX_MOVED, MAX_MOVED, 10, 0]


def test_idle_backends_that_can_hold_nobody_are_not_in_the_way() -> None:
    scheduler = Scheduler(SchedulerConfig(), policy=Silent())
    for number in range(MAX_MOVED + 1):
        tokens = 1000 if number < MAX_MOVED else 5000
        scheduler.handle(BackendUp(backend=f"b{number:03d}", generation=0, capacity_tokens=tokens, max_running=8), 0.0)
    (restore,) = scheduler.handle(TurnRequested(program="long", request="r", prompt_tokens=3000), 1.0)
    assert isinstance(restore, Restore)
    assert restore.backend == f"b{MAX_MOVED:03d}"
