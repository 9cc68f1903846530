from __future__ import annotations

from thunder_rollout.core.config import SchedulerConfig, TtlConfig
from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import ProgramEnded, ToolStarted
from thunder_rollout.core.harness import Harness


def ttl(**capacity_tokens: int) -> Harness:
    config = TtlConfig(headroom_tokens=0, default_ttl_s=5.0, max_ttl_s=60.0, ttl_quantile=1.0)
    return Harness(SchedulerConfig(policy="ttl", ttl=config), **capacity_tokens)


def who(decisions: list[Decision]) -> list[str]:
    return [decision.program for decision in decisions if isinstance(decision, Restore)]


def acts(shell: Harness, program: str, tool: str) -> None:
    shell.end(program)
    shell.send(ToolStarted(program=program, tool=tool))


def test_a_program_is_pinned_while_it_acts_until_its_time_to_live_is_over() -> None:
    shell = ttl(a=1000)
    shell.ask("p", 600)
    shell.ask("keeper", 100)
    acts(shell, "p", "bash")
    assert shell.ask("q", 500) == []
    assert shell.tick(5.0) == []
    assert shell.tick(1.0) == [
        Pause(program="p", backend="a"),
        Restore(program="q", backend="a", generation=1, request="r3", grant=3),
    ]


def test_the_time_to_live_is_that_of_the_tool() -> None:
    shell = ttl(a=1000)
    shell.ask("p", 600)
    shell.ask("keeper", 100)
    acts(shell, "p", "compile")
    shell.now = 30.0
    assert who(shell.ask("p", 610)) == ["p"]
    acts(shell, "p", "compile")
    shell.ask("q", 500)
    assert shell.tick(20.0) == []
    assert who(shell.tick(11.0)) == ["q"]


def test_nobody_passes_the_head_of_the_queue() -> None:
    shell = ttl(a=1000)
    shell.ask("p", 800)
    assert shell.ask("long", 950) == []
    assert shell.ask("short", 100) == []
    assert who(shell.send(ProgramEnded(program="p"))) == ["long"]


def test_the_newest_gives_way_where_contexts_outgrew_the_pool() -> None:
    shell = ttl(a=1000)
    shell.ask("old", 400)
    shell.ask("new", 400)
    assert shell.end("old", 300) == []
    assert shell.scheduler.snapshot().backends[0].num_marked == 1
    assert shell.end("new", 10) == [Pause(program="new", backend="a")]


def test_a_paused_program_goes_back_to_where_it_ran() -> None:
    shell = ttl(a=1000, b=1000)
    shell.ask("p", 500)
    shell.ask("filler", 950)
    shell.ask("keeper", 100)
    acts(shell, "p", "bash")
    shell.ask("q", 600)
    assert who(shell.tick(6.0)) == ["q"]
    shell.send(ProgramEnded(program="q"))
    shell.send(ProgramEnded(program="filler"))
    shell.ask("small", 10)
    (decision,) = shell.ask("p", 510)
    assert isinstance(decision, Restore)
    assert decision.backend == "a"
