from __future__ import annotations

from thunder_rollout.core.config import CappedConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, Restore
from thunder_rollout.core.events import ProgramEnded, Withdrawn
from thunder_rollout.core.harness import Harness


def capped(max_programs: int, **capacity_tokens: int) -> Harness:
    config = SchedulerConfig(policy="capped", capped=CappedConfig(max_programs=max_programs))
    return Harness(config, **capacity_tokens)


def who(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Restore)]


def test_programs_beyond_the_limit_wait_for_one_to_end() -> None:
    shell = capped(2, a=10_000)
    assert [who(shell.ask(name, 100)) for name in "pqrs"] == [["p"], ["q"], [], []]
    assert shell.end("p") == []
    assert who(shell.ask("p", 120)) == ["p"]  # it keeps its place while it acts
    assert who(shell.send(ProgramEnded(program="q"))) == ["r"]
    assert who(shell.send(Withdrawn(program="p"))) == ["s"]


def test_the_first_to_ask_is_the_first_served_however_long() -> None:
    shell = capped(1, a=10_000)
    shell.ask("p", 100)
    shell.ask("long", 5000)
    shell.ask("short", 10)
    assert shell.scheduler.waiting_order() == ["long", "short"]
    assert who(shell.send(ProgramEnded(program="p"))) == ["long"]


def test_free_places_spread_over_the_backends() -> None:
    shell = capped(4)
    for name in "pqrst":
        shell.ask(name, 100)
    assert who(shell.up("a", 1000)) == ["p", "q", "r", "s"]
    shell.down("a")
    assert shell.scheduler.waiting_order() == ["t", "p", "q", "r", "s"]


def test_a_program_whose_backend_died_goes_before_new_ones() -> None:
    shell = capped(1, a=1000)
    shell.ask("p", 100)
    shell.ask("q", 100)
    shell.down("a")
    shell.ask("p", 100)
    assert who(shell.up("a", 1000, generation=2)) == ["p"]


def test_an_idle_backend_takes_the_next_program_beyond_the_limit() -> None:
    shell = capped(1, a=1000)
    shell.ask("p", 100)
    shell.ask("q", 100)
    assert who(shell.end("p")) == ["q"]


def test_no_backend_no_decision() -> None:
    shell = capped(1)
    assert shell.ask("p", 100) == []
    assert shell.tick(1.0) == []
