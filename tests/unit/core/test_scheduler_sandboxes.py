from __future__ import annotations

import pytest

from thunder_rollout.core.config import CappedConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, PrepareSandbox, ReleaseSandbox, Restore
from thunder_rollout.core.events import (
    ProgramAnnounced,
    ProgramEnded,
    SandboxFailed,
    SandboxReady,
    SandboxStopped,
    Withdrawn,
)
from thunder_rollout.core.harness import Harness
from thunder_rollout.errors import BadEvent


def harness(*, prepare_ahead: int = 2, **capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy="sticky", prepare_ahead=prepare_ahead), **capacity_tokens)


def kinds(decisions: list[Decision]) -> list[str]:
    return [type(decision).__name__ for decision in decisions]


def test_a_sandbox_is_prepared_before_the_first_restore_and_released_at_the_end() -> None:
    shell = harness(a=1000)
    shell.now = 3.0
    decisions = shell.ask("p", 100, sandbox=True)
    assert decisions[0] == PrepareSandbox(program="p", by_s=3.0)
    assert kinds(decisions) == ["PrepareSandbox", "Restore"]
    shell.send(SandboxReady(program="p", took_s=1.0))
    shell.end("p")
    assert kinds(shell.ask("p", 120, sandbox=True)) == ["Restore"]
    assert shell.send(ProgramEnded(program="p")) == [ReleaseSandbox(program="p")]


def test_a_program_without_a_sandbox_never_gets_one() -> None:
    shell = harness(a=1000)
    assert kinds(shell.ask("p", 100)) == ["Restore"]
    assert shell.send(ProgramEnded(program="p")) == []


def test_the_first_in_the_queue_are_prepared_ahead_no_more_than_told() -> None:
    shell = harness(prepare_ahead=2)
    assert kinds(shell.ask("p", 100, sandbox=True)) == ["PrepareSandbox"]
    assert kinds(shell.ask("q", 100, sandbox=True)) == ["PrepareSandbox"]
    assert shell.ask("r", 100, sandbox=True) == []
    assert shell.send(Withdrawn(program="q")) == [
        ReleaseSandbox(program="q"),
        PrepareSandbox(program="r", by_s=0.0),
    ]


def one_a_second(*, start_s: float, num_rounds: int, prepare_ahead: int = 64) -> tuple[Harness, list[str]]:
    """Ten programs run; every second the oldest ends, the next is granted, and another comes. A sandbox takes
    `start_s`. Returns the names of those that were granted before their sandbox was ready."""
    config = SchedulerConfig(policy="capped", capped=CappedConfig(max_programs=10), prepare_ahead=prepare_ahead)
    shell = Harness(config, a=10_000)
    starting: dict[str, float] = {}
    late: list[str] = []

    def follow(decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, PrepareSandbox):
                starting[decision.program] = shell.now + start_s
            elif isinstance(decision, Restore) and decision.program in starting:
                late.append(decision.program)

    for number in range(50):
        follow(shell.ask(f"p{number}", 100, sandbox=True))
    for number in range(num_rounds):
        shell.now += 1.0
        for name in [name for name, at_s in starting.items() if at_s <= shell.now]:
            del starting[name]
            shell.send(SandboxReady(program=name))
        follow(shell.end(f"p{number}", 5))
        follow(shell.send(ProgramEnded(program=f"p{number}")))
        follow(shell.ask(f"p{number + 50}", 100, sandbox=True))
    return shell, late


def test_once_it_is_learned_how_long_starts_take_sandboxes_are_ready_in_time_and_not_long_before() -> None:
    shell, late = one_a_second(start_s=6.5, num_rounds=80)
    assert set(late) <= {f"p{number}" for number in range(29)}, "while little was learned"
    assert len(shell.scheduler._state.prepared) == 7


def test_without_preparation_every_program_waits_for_its_sandbox() -> None:
    _, late = one_a_second(start_s=6.5, num_rounds=30, prepare_ahead=0)
    assert late == [f"p{number}" for number in range(40)]


def test_preparations_are_due_in_the_order_of_the_grants() -> None:
    shell, _ = one_a_second(start_s=6.5, num_rounds=60)
    waiting = shell.scheduler.waiting_order()
    for name in waiting[1:4]:
        shell.send(Withdrawn(program=name))
    prepared = [d for decisions in shell.decisions[-3:] for d in decisions if isinstance(d, PrepareSandbox)]
    assert prepared == [PrepareSandbox(program=name, by_s=shell.now + 7.0) for name in waiting[7:10]]


def test_who_comes_to_the_head_of_the_queue_is_prepared_first() -> None:
    config = SchedulerConfig(policy="thunder", prepare_ahead=1)
    shell = Harness(config)
    shell.ask("long", 500, sandbox=True)
    assert shell.ask("short", 100, sandbox=True) == [], "no more than one is prepared"
    assert kinds(shell.up("a", 300)) == ["Reject", "ReleaseSandbox", "PrepareSandbox", "Restore"]


def test_a_sandbox_that_was_stopped_while_its_program_waits_is_had_back_before_its_grant() -> None:
    shell = harness(a=1000)
    shell.ask("p", 100, sandbox=True)
    shell.send(SandboxReady(program="p"))
    shell.end("p", 5)
    shell.down("a")
    assert shell.ask("p", 120, sandbox=True) == []
    assert shell.send(SandboxStopped(program="p")) == [PrepareSandbox(program="p", by_s=0.0)]
    assert shell.send(SandboxStopped(program="p")) == [], "it is on its way"
    assert kinds(shell.up("a", 1000, generation=2)) == ["Restore"]
    assert shell.send(ProgramEnded(program="p")) == [ReleaseSandbox(program="p")]


def test_a_sandbox_that_was_stopped_while_its_program_was_granted_a_turn_is_had_back_at_once() -> None:
    shell = harness(a=1000)
    shell.ask("p", 100, sandbox=True)
    shell.now = 2.0
    assert shell.send(SandboxStopped(program="p")) == [PrepareSandbox(program="p", by_s=2.0)]
    shell.end("p", 5)
    shell.send(SandboxStopped(program="p"))
    assert kinds(shell.ask("p", 120, sandbox=True)) == ["PrepareSandbox", "Restore"], "with its next turn"


def test_nothing_is_prepared_ahead_if_told_so() -> None:
    shell = harness(prepare_ahead=0)
    assert shell.ask("p", 100, sandbox=True) == []
    assert shell.send(Withdrawn(program="p", request="r1")) == []
    assert shell.ask("p", 100, sandbox=True) == []
    assert kinds(shell.up("a", 1000)) == ["PrepareSandbox", "Restore"]


def test_a_withdrawn_program_releases_what_was_prepared() -> None:
    shell = harness()
    shell.ask("p", 100, sandbox=True)
    assert shell.send(Withdrawn(program="p", request="r1")) == [ReleaseSandbox(program="p")]


def test_a_rejected_program_releases_what_was_prepared() -> None:
    shell = harness()
    shell.ask("p", 1000, sandbox=True)
    assert kinds(shell.up("a", 100)) == ["Reject", "ReleaseSandbox"]


def test_a_failed_sandbox_is_prepared_again_on_the_next_request_and_released_once() -> None:
    shell = harness(a=1000)
    shell.ask("p", 100, sandbox=True)
    assert shell.send(SandboxFailed(program="p", reason="no image")) == []
    shell.end("p")
    assert kinds(shell.ask("p", 120, sandbox=True)) == ["PrepareSandbox", "Restore"]
    assert shell.send(ProgramEnded(program="p")) == [ReleaseSandbox(program="p")]


def test_a_sandbox_that_failed_last_is_released_too() -> None:
    shell = harness(a=1000)
    shell.ask("p", 100, sandbox=True)
    shell.send(SandboxFailed(program="p"))
    assert shell.send(ProgramEnded(program="p")) == [ReleaseSandbox(program="p")]


def test_news_of_a_program_that_ended_meanwhile_is_ignored() -> None:
    shell = harness(a=1000)
    assert shell.send(SandboxReady(program="gone")) == []
    assert shell.send(SandboxStopped(program="gone")) == []
    assert shell.send(SandboxFailed(program="gone")) == []


def test_announced_programs_are_prepared_behind_those_that_wait_in_their_order() -> None:
    shell = harness(prepare_ahead=3)
    announced = [PrepareSandbox(program=name, by_s=0.0) for name in ("x", "y", "z")]
    assert shell.send(ProgramAnnounced(program="x", task_kind="toy")) == announced[:1]
    shell.ask("p", 100, sandbox=True)
    assert shell.send(ProgramAnnounced(program="y")) == announced[1:2]
    assert shell.send(ProgramAnnounced(program="z")) == [], "three are prepared"
    assert shell.send(ProgramEnded(program="x")) == [ReleaseSandbox(program="x"), announced[2]]
    assert shell.send(Withdrawn(program="y")) == [ReleaseSandbox(program="y")]


def test_an_announced_program_finds_its_sandbox_up_although_it_is_granted_as_it_comes() -> None:
    shell = harness(a=10_000, prepare_ahead=64)
    shell.send(ProgramAnnounced(program="x", task_kind="toy"))
    shell.now = 5.0
    assert shell.send(SandboxReady(program="x")) == []
    assert kinds(shell.ask("x", 100, sandbox=True)) == ["Restore"]
    program = shell.scheduler._state.programs["x"]
    assert (program.arrived_s, program.task_kind) == (5.0, "toy")
    assert shell.send(ProgramEnded(program="x")) == [ReleaseSandbox(program="x")]
    for number in range(40):
        shell.send(ProgramAnnounced(program=f"p{number}", task_kind="toy"))
    for number in range(20):
        shell.now += 5.0
        for name in sorted(shell.scheduler._state.prepared):
            shell.send(SandboxReady(program=name))
        shell.ask(f"p{number}", 100, sandbox=True)
    assert len(shell.scheduler._state.prepared) == 1, "one comes in five seconds, and five is what a start takes"


def test_an_announced_programs_failed_sandbox_is_prepared_with_its_request() -> None:
    shell = harness(a=1000)
    shell.send(ProgramAnnounced(program="x"))
    assert shell.send(SandboxFailed(program="x")) == []
    assert shell.send(SandboxStopped(program="x")) == []
    assert kinds(shell.ask("x", 100, sandbox=True)) == ["PrepareSandbox", "Restore"]
    assert shell.send(ProgramEnded(program="x")) == [ReleaseSandbox(program="x")]


def test_an_announced_program_that_was_not_prepared_ends_without_a_trace() -> None:
    shell = harness(prepare_ahead=0)
    assert shell.send(ProgramAnnounced(program="x")) == []
    assert shell.send(ProgramEnded(program="x")) == []
    assert shell.send(Withdrawn(program="x")) == []


def test_a_program_is_announced_once_and_before_its_first_request() -> None:
    shell = harness(a=1000)
    shell.ask("p", 100)
    shell.send(ProgramAnnounced(program="x"))
    for name in ("p", "x"):
        with pytest.raises(BadEvent, match=name):
            shell.send(ProgramAnnounced(program=name))
