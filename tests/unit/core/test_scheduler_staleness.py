"""Programs whose tokens are of weights too old are dropped before they are computed again."""

from __future__ import annotations

import pytest

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Decision, Expire, ExpiryReason, ReleaseSandbox, Restore
from thunder_rollout.core.events import BackendUp, FinishReason, TurnEnded, WeightsUpdated, WeightsUpdating
from thunder_rollout.core.harness import Harness
from thunder_rollout.errors import ConfigError


def bounded(max_staleness: int | None, policy: str = "adaptive") -> Harness:
    return Harness(SchedulerConfig(policy=policy, max_staleness=max_staleness), a=1000)


def end(shell: Harness, program: str, version: str | None, *, tokens: int | None = 10, cut: bool = False) -> None:
    grant = next(grant for grant, (holder, _) in shell.grants.items() if holder == program)
    shell.send(
        TurnEnded(
            program=program,
            grant=grant,
            output_tokens=tokens,
            weight_version=version,
            finish_reason=FinishReason.ABORT if cut else FinishReason.STOP,
        )
    )


def update(shell: Harness, version: str | None) -> list[Decision]:
    shell.send(WeightsUpdating(backends=("a",)))
    return shell.send(WeightsUpdated(backends=("a",), version=version))


def stale(program: str, *requests: str) -> Expire:
    return Expire(program=program, reason=ExpiryReason.STALE, requests=requests)


def test_who_acts_while_weights_update_is_dropped_when_it_asks_next() -> None:
    shell = bounded(0)
    shell.ask("p", 100, sandbox=True)
    end(shell, "p", "0")
    assert update(shell, "1") == []
    assert shell.ask("p", 150, request="again") == [stale("p", "again"), ReleaseSandbox(program="p")]
    assert shell.scheduler.snapshot().num_programs == 0


def test_who_waits_while_weights_update_is_dropped_before_anybody_is_restored() -> None:
    shell = bounded(0)
    for name in ("old", "new"):
        shell.ask(name, 100)
    end(shell, "old", "0")
    end(shell, "new", None)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.ask("old", 150, request="old/2")
    shell.ask("new", 150, request="new/2")
    decisions = shell.send(WeightsUpdated(backends=("a",), version="1"))
    assert decisions[0] == stale("old", "old/2")
    assert [d.program for d in decisions if isinstance(d, Restore)] == ["new"]


def test_the_oldest_token_counts_and_so_many_versions_are_allowed() -> None:
    shell = bounded(1)
    shell.ask("p", 100)
    end(shell, "p", "0")
    update(shell, "step_10")
    shell.ask("p", 150)
    end(shell, "p", "step_10")
    update(shell, "step_20")
    assert shell.ask("p", 200, request="last") == [stale("p", "last")]


def test_a_kept_part_of_a_cut_turn_counts_and_a_dropped_one_does_not() -> None:
    shell = bounded(0)
    for name in ("kept", "dropped"):
        shell.ask(name, 100)
    shell.send(WeightsUpdating(backends=("a",)))
    end(shell, "kept", "0", tokens=5, cut=True)
    end(shell, "dropped", "0", tokens=0, cut=True)
    shell.ask("kept", 105, request="kept/2")
    shell.ask("dropped", 100, request="dropped/2")
    decisions = shell.send(WeightsUpdated(backends=("a",), version="1"))
    assert [d for d in decisions if isinstance(d, Expire)] == [stale("kept", "kept/2")]
    assert [d.program for d in decisions if isinstance(d, Restore)] == ["dropped"]


def test_a_failed_update_and_one_that_is_told_twice_make_nobody_older() -> None:
    shell = bounded(0)
    update(shell, "1")
    shell.ask("p", 100)
    end(shell, "p", "1")
    update(shell, None)
    update(shell, "1")
    (decision,) = shell.ask("p", 150)
    assert isinstance(decision, Restore)


def test_tokens_may_come_before_their_version_is_announced() -> None:
    shell = bounded(0)
    shell.ask("p", 100)
    shell.send(WeightsUpdating(backends=("a",)))
    end(shell, "p", "1")
    shell.send(WeightsUpdated(backends=("a",), version="1"))
    (decision,) = shell.ask("p", 150)
    assert isinstance(decision, Restore)


def test_older_weights_that_come_back_drop_nobody() -> None:
    shell = bounded(0)
    update(shell, "1")
    update(shell, "2")
    shell.ask("p", 100)
    end(shell, "p", "2")
    update(shell, "1")
    (decision,) = shell.ask("p", 150)
    assert isinstance(decision, Restore)


def test_a_program_with_several_turns_is_dropped_whole() -> None:
    shell = bounded(0)
    shell.ask("p", 100, request="first")
    end(shell, "p", "0")
    shell.ask("p", 150, request="second")
    shell.send(WeightsUpdating(backends=("a",)))
    shell.ask("p", 120, request="third")
    assert stale("p", "third") in shell.send(WeightsUpdated(backends=("a",), version="1"))
    assert not shell.grants
    shell.send(TurnEnded(program="p", grant=2, output_tokens=5))  # late, and ignored


def test_without_a_bound_nobody_is_dropped() -> None:
    shell = bounded(None)
    shell.ask("p", 100)
    end(shell, "p", "0")
    for number in range(1, 5):
        update(shell, str(number))
    (decision,) = shell.ask("p", 150)
    assert isinstance(decision, Restore)


@pytest.mark.parametrize("policy", ["adaptive", "sticky", "thunder"])
def test_an_update_that_a_backend_does_not_survive_leaves_its_gate_open(policy: str) -> None:
    shell = bounded(None, policy)
    shell.ask("p", 100)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.down("a")
    shell.ask("p", 100, request="again")
    decisions = shell.send(BackendUp(backend="a", generation=2, capacity_tokens=1000, max_running=8))
    assert [d.request for d in decisions if isinstance(d, Restore)] == ["again"]


def test_the_bound_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"scheduler.max_staleness=-1: must be >= 0 or null"):
        SchedulerConfig(max_staleness=-1)


@pytest.mark.parametrize(("tokens", "is_stale"), [(10, True), (0, False), (None, True)])
def test_tokens_of_a_turn_that_ends_on_a_backend_which_left_are_counted(tokens: int | None, is_stale: bool) -> None:
    shell = bounded(0)
    shell.ask("p", 100)
    (grant,) = shell.grants
    shell.up("b", 1000)
    shell.down("a")
    shell.send(TurnEnded(program="p", grant=grant, output_tokens=tokens, weight_version="0"))
    shell.send(WeightsUpdating(backends=("b",)))
    shell.send(WeightsUpdated(backends=("b",), version="1"))
    assert (shell.ask("p", 150, request="again") == [stale("p", "again")]) == is_stale
