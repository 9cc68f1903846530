"""Requests, grants and ends, under `sticky`, which adds nothing of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Reject, Restore
from thunder_rollout.core.events import (
    Event,
    FinishReason,
    ProgramEnded,
    Tick,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnProgress,
    TurnRequested,
    TurnStarted,
    Withdrawn,
)
from thunder_rollout.core.harness import Harness, replay
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.errors import BadEvent


def sticky(**capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy="sticky"), **capacity_tokens)


def restore(program: str, request: str, grant: int, backend: str = "a") -> Restore:
    return Restore(program=program, backend=backend, generation=1, request=request, grant=grant)


def test_a_request_is_admitted_and_its_turn_ends() -> None:
    shell = sticky(a=1000)
    assert shell.ask("p", 100, request="r1") == [restore("p", "r1", 1)]
    assert shell.send(TurnStarted(program="p", grant=1)) == []
    assert shell.send(TurnProgress(program="p", grant=1, output_tokens=7)) == []
    assert shell.scheduler.snapshot().backends[0].demand_tokens == 107
    assert shell.end("p", 20) == []
    backend = shell.scheduler.snapshot().backends[0]
    assert (backend.demand_tokens, backend.num_reasoning, backend.num_acting, backend.num_in_flight) == (120, 0, 1, 0)


def test_grants_increase() -> None:
    shell = sticky(a=1000, b=1000)
    shell.ask("p", 10)
    shell.ask("q", 10)
    shell.end("p")
    assert shell.ask("p", 20, request="r") == [restore("p", "r", 3)]


def test_a_program_may_have_several_turns_in_flight() -> None:
    shell = sticky(a=1000)
    assert shell.ask("p", 100, request="r1") == [restore("p", "r1", 1)]
    assert shell.ask("p", 40, request="r2") == [restore("p", "r2", 2)]
    assert shell.scheduler.snapshot().backends[0].demand_tokens == 100
    shell.end("p", 10)
    assert shell.scheduler.snapshot().backends[0].num_reasoning == 1
    shell.end("p", 5)
    assert shell.scheduler.snapshot().backends[0].demand_tokens == 45


def test_requests_wait_for_the_first_backend_and_go_out_in_order() -> None:
    shell = sticky()
    assert shell.ask("p", 100, request="r1") == []
    assert shell.ask("q", 100, request="r2") == []
    assert shell.ask("p", 50, request="r3") == []
    assert shell.scheduler.waiting_order() == ["p", "q"]
    assert shell.up("a", 1000) == [restore("p", "r1", 1), restore("p", "r3", 2), restore("q", "r2", 3)]


def test_what_fits_no_backend_is_rejected_and_forgotten() -> None:
    shell = sticky(a=100, b=200)
    assert shell.ask("p", 199) == [Restore(program="p", backend="b", generation=1, request="r1", grant=1)]
    (decision,) = shell.ask("q", 200, request="r2")
    assert isinstance(decision, Reject)
    assert (decision.program, decision.request) == ("q", "r2")
    assert decision.why == (
        "prompt_tokens=200 and one token more fit no backend: the largest has capacity_tokens=200; "
        "shorten the context or give the engine more KV memory"
    )
    assert shell.scheduler.snapshot().num_programs == 1


def test_a_rejected_request_leaves_its_program_as_it_was() -> None:
    shell = sticky(a=100)
    shell.ask("p", 50)
    shell.end("p", 10)
    before = shell.scheduler.snapshot()
    assert isinstance(shell.ask("p", 100)[0], Reject)
    assert shell.scheduler.snapshot() == before


def test_a_program_that_outgrew_its_backend_moves_to_one_that_holds_it() -> None:
    shell = sticky(a=100, b=200)
    shell.ask("p", 50, request="r1")
    shell.end("p", 10)
    decisions = shell.ask("p", 150, request="r2")
    assert [type(decision).__name__ for decision in decisions] == ["Pause", "Restore"]
    assert decisions[1] == restore("p", "r2", 2, backend="b")


def test_with_a_turn_in_flight_it_moves_when_that_ends() -> None:
    shell = sticky(a=100, b=200)
    shell.ask("p", 50, request="r1")
    assert shell.ask("p", 150, request="r2") == []
    assert shell.ask("p", 160, request="r3") == []
    assert shell.scheduler.snapshot().backends[0].num_marked == 1
    decisions = shell.end("p", 10)
    assert decisions[1:] == [restore("p", "r2", 2, backend="b"), restore("p", "r3", 3, backend="b")]


def test_a_program_that_ended_is_forgotten_and_its_name_is_free() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    assert shell.send(ProgramEnded(program="p")) == []
    assert shell.scheduler.snapshot().num_programs == 0
    assert shell.send(TurnEnded(program="p", grant=1, output_tokens=5)) == []  # it was on its way
    assert shell.ask("p", 30, request="r") == [restore("p", "r", 2)]
    assert shell.scheduler.snapshot().backends[0].demand_tokens == 30


def test_a_withdrawn_new_program_leaves_no_trace() -> None:
    shell = sticky()
    empty = shell.scheduler.snapshot()
    shell.ask("p", 100, request="r1")
    shell.ask("p", 100, request="r2")
    assert shell.send(Withdrawn(program="p", request="r1")) == []
    assert shell.scheduler.waiting_order() == ["p"]
    assert shell.send(Withdrawn(program="p", request="r2")) == []
    assert shell.scheduler.snapshot() == empty


def test_withdrawn_is_no_error_when_it_comes_late() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    before = shell.scheduler.snapshot()
    assert shell.send(Withdrawn(program="p", request="gone")) == []
    assert shell.send(Withdrawn(program="nobody")) == []
    assert shell.send(Withdrawn(program="nobody", request="r")) == []
    assert shell.scheduler.snapshot() == before


def test_a_first_turn_withdrawn_before_it_started_leaves_no_trace() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100, request="r")
    shell.send(Withdrawn(program="p", request="r"))
    assert shell.scheduler.snapshot().num_programs == 0
    assert shell.send(TurnEnded(program="p", grant=1)) == []


def test_a_started_turn_withdrawn_leaves_its_program_bound_and_not_acting() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100, request="r")
    shell.send(TurnStarted(program="p", grant=1))
    shell.send(Withdrawn(program="p", request="r"))
    backend = shell.scheduler.snapshot().backends[0]
    assert (backend.num_reasoning, backend.num_in_flight, backend.demand_tokens) == (1, 0, 100)
    assert shell.send(TurnProgress(program="p", grant=1, output_tokens=9)) == []


def test_withdrawing_the_whole_program_ends_it() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.send(Withdrawn(program="p"))
    assert shell.scheduler.snapshot().num_programs == 0


@pytest.mark.parametrize("finish_reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_cut_turn_does_not_start_acting(finish_reason: FinishReason) -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.end("p", 10, finish_reason=finish_reason)
    assert shell.scheduler.snapshot().backends[0].num_acting == 0


def test_tools_are_noted() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.end("p")
    assert shell.send(ToolStarted(program="p", tool="bash")) == []
    assert shell.send(ToolEnded(program="p")) == []


BAD: list[tuple[Event, str]] = [
    (TurnRequested(program="p", request="new", prompt_tokens=0), "prompt_tokens=0: must be >= 1"),
    (TurnRequested(program="new", request="r", prompt_tokens=5, age_s=-1.0), "age_s=-1.0: must be >= 0"),
    (TurnRequested(program="p", request="r1", prompt_tokens=5), "request='r1': already open"),
    (TurnRequested(program="q", request="r2", prompt_tokens=5), "request='r2': already open"),
    (TurnStarted(program="p", grant=9), "grant=9: not current"),
    (TurnStarted(program="nobody", grant=1), "grant=1: not current for program='nobody'"),
    (TurnProgress(program="p", grant=1, output_tokens=-1), "output_tokens=-1: must be >= 0"),
    (TurnProgress(program="p", grant=9, output_tokens=1), "grant=9"),
    (TurnEnded(program="p", grant=9), "grant=9"),
    (TurnEnded(program="p", grant=1, output_tokens=-1), "output_tokens=-1"),
    (TurnEnded(program="p", grant=1, cached_tokens=-1), "cached_tokens=-1"),
    (ToolStarted(program="nobody"), "program='nobody': unknown"),
    (ToolEnded(program="nobody"), "program='nobody': unknown"),
    (ProgramEnded(program="nobody"), "program='nobody': unknown"),
    ("surprise", "str: not an event"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("event", "message"), BAD)
def test_a_bad_event_is_refused_and_changes_nothing(event: Event, message: str) -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100, request="r1")
    shell.ask("q", 100, request="r2")
    before = shell.scheduler.snapshot()
    shell.now = 50.0
    with pytest.raises(BadEvent, match=message):
        shell.send(event)
    assert shell.scheduler.snapshot() == before
    shell.now = 1.0  # time did not advance with the refused event
    assert shell.tick() == []


@pytest.mark.parametrize("now", [4.9, float("nan")])
def test_time_does_not_run_backwards(now: float) -> None:
    scheduler = Scheduler(SchedulerConfig())
    scheduler.handle(Tick(), 5.0)
    with pytest.raises(BadEvent, match="one monotonic clock"):
        scheduler.handle(Tick(), now)
    assert scheduler.handle(Tick(), 5.0) == []


def test_a_turn_ends_once() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.end("p")
    with pytest.raises(BadEvent, match="grant=1: not current"):
        shell.send(TurnEnded(program="p", grant=1))


def test_void_grants_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.core.state.MAX_VOID_GRANTS", 2)
    shell = sticky(a=1000)
    for index in range(3):
        shell.ask(f"p{index}", 100)
        shell.send(ProgramEnded(program=f"p{index}"))
    assert shell.send(TurnEnded(program="p2", grant=3)) == []
    with pytest.raises(BadEvent):
        shell.send(TurnEnded(program="p0", grant=1))


def test_the_same_events_give_the_same_decisions() -> None:
    shell = sticky(a=1000, b=500)
    steps: list[Callable[[], object]] = [
        lambda: shell.ask("p", 100),
        lambda: shell.ask("q", 600),
        lambda: shell.end("p", 10),
        lambda: shell.tick(5.0),
        lambda: shell.down("a"),
        lambda: shell.ask("q", 400),
    ]
    for step in steps:
        step()
    assert replay(shell.config, shell.log) == shell.decisions
