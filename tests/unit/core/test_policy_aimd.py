from __future__ import annotations

from thunder_rollout.core.config import AimdConfig, SchedulerConfig
from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import TurnEnded
from thunder_rollout.core.harness import Harness


def aimd(**capacity_tokens: int) -> Harness:
    config = AimdConfig(initial_programs=2, grow_programs=1, cut_share=0.5, max_lost_share=0.1)
    return Harness(SchedulerConfig(policy="aimd", aimd=config), **capacity_tokens)


def who(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Restore)]


def turn(shell: Harness, program: str, prompt_tokens: int, cached_tokens: int | None) -> list[Decision]:
    shell.ask(program, prompt_tokens)
    grant = next(grant for grant, (holder, _) in shell.grants.items() if holder == program)
    return shell.send(TurnEnded(program=program, grant=grant, output_tokens=10, cached_tokens=cached_tokens))


def test_the_limit_grows_while_somebody_waits_and_nothing_is_lost() -> None:
    shell = aimd(a=10_000)
    assert [who(shell.ask(name, 100)) for name in "pqrs"] == [["p"], ["q"], [], []]
    assert shell.tick(5.0) == []
    assert who(shell.ask("t", 100)) == ["r"], "the limit is three now"
    assert shell.tick(5.0) == []
    assert who(shell.tick(5.0)) == ["s"]


def test_it_is_cut_when_caches_lose_what_was_computed() -> None:
    shell = aimd(a=10_000)
    turn(shell, "p", 100, 0)
    shell.now = 1.0
    turn(shell, "q", 100, 0)
    assert shell.tick(5.0) == [], "a first prompt was never computed before"
    turn(shell, "p", 150, 20)
    assert shell.tick(5.0) == [Pause(program="q", backend="a")]
    assert who(shell.ask("p", 170)) == ["p"]
    assert shell.ask("r", 100) == [], "the limit is one"


def test_it_is_cut_when_contexts_outgrow_the_pool() -> None:
    shell = aimd(a=1000)
    shell.ask("p", 600)
    shell.ask("q", 500)
    shell.tick(5.0)
    assert shell.scheduler.snapshot().backends[0].num_marked == 1
    assert shell.tick(5.0) == [], "what is marked counts as gone"


def test_it_rests_while_nobody_waits() -> None:
    shell = aimd(a=10_000)
    turn(shell, "p", 100, None)
    for _ in range(3):
        assert shell.tick(5.0) == []
    assert [who(shell.ask(name, 100)) for name in "qr"] == [["q"], []]
