from __future__ import annotations

import pytest

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Expire, ReleaseSandbox
from thunder_rollout.core.events import ToolStarted, TurnEnded, TurnProgress
from thunder_rollout.core.harness import Harness
from thunder_rollout.errors import BadEvent, ConfigError


def leased(lease_s: float | None = 60.0, **capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy="sticky", lease_s=lease_s), **capacity_tokens)


def test_a_silent_program_is_terminated_and_its_sandbox_released() -> None:
    shell = leased(a=1000)
    shell.ask("p", 100, sandbox=True)
    shell.end("p")
    assert shell.tick(59.0) == []
    assert shell.tick(1.0) == [Expire(program="p"), ReleaseSandbox(program="p")]
    assert shell.scheduler.snapshot().num_programs == 0


def test_any_event_about_it_renews_the_lease() -> None:
    shell = leased(a=1000)
    shell.ask("p", 100)
    shell.ask("q", 100)
    shell.now = 40.0
    shell.send(TurnProgress(program="p", grant=1, output_tokens=5))
    assert shell.tick(30.0) == [Expire(program="q")]
    shell.end("p")
    shell.now = 120.0
    shell.send(ToolStarted(program="p"))
    assert shell.tick(50.0) == []
    assert shell.tick(10.0) == [Expire(program="p")]


def test_a_turn_whose_caller_fell_silent_is_void() -> None:
    shell = leased(a=1000)
    shell.ask("p", 100)
    assert shell.tick(60.0) == [Expire(program="p")]
    assert shell.send(TurnEnded(program="p", grant=1)) == []
    with pytest.raises(BadEvent):
        shell.send(ToolStarted(program="p"))


def test_a_program_that_waits_for_an_answer_is_not_silent() -> None:
    shell = leased()
    shell.ask("p", 100)
    assert shell.tick(1000.0) == []
    shell.up("a", 1000)
    assert shell.tick(59.0) == [], "the lease runs from the grant"
    assert shell.tick(1.0) == [Expire(program="p")]


def test_without_a_lease_nobody_expires() -> None:
    shell = leased(None, a=1000)
    shell.ask("p", 100)
    assert shell.tick(1e6) == []


def test_a_lease_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.lease_s=0"):
        SchedulerConfig(lease_s=0)
