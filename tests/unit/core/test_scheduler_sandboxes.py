from __future__ import annotations

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Decision, PrepareSandbox, ReleaseSandbox
from thunder_rollout.core.events import ProgramEnded, SandboxFailed, SandboxReady, Withdrawn
from thunder_rollout.core.harness import Harness


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


def test_the_first_in_the_queue_are_prepared_ahead() -> None:
    shell = harness(prepare_ahead=2)
    assert kinds(shell.ask("p", 100, sandbox=True)) == ["PrepareSandbox"]
    assert kinds(shell.ask("q", 100, sandbox=True)) == ["PrepareSandbox"]
    assert shell.ask("r", 100, sandbox=True) == []
    assert shell.send(Withdrawn(program="q")) == [
        ReleaseSandbox(program="q"),
        PrepareSandbox(program="r", by_s=0.0),
    ]


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
    assert shell.send(SandboxFailed(program="gone")) == []
