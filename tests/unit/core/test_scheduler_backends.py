from __future__ import annotations

from unittest.mock import ANY

import pytest

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Pause, Reject, Restore
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    Event,
    TurnEnded,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.harness import Harness
from thunder_rollout.errors import BadEvent


def sticky(**capacity_tokens: int) -> Harness:
    return Harness(SchedulerConfig(policy="sticky"), **capacity_tokens)


def test_programs_of_a_dead_backend_wait_with_their_tokens_for_their_next_request() -> None:
    shell = sticky(a=1000, b=1000)
    shell.ask("p", 100)
    shell.ask("q", 200)
    assert shell.down("a") == [Pause(program="p", backend="a")]
    snapshot = shell.scheduler.snapshot()
    assert (snapshot.num_waiting_acting, snapshot.waiting_tokens, len(snapshot.backends)) == (1, 100, 1)
    assert shell.send(TurnEnded(program="p", grant=1, output_tokens=5)) == []  # late, and void
    assert shell.ask("p", 100, request="again") == [
        Restore(program="p", backend="b", generation=1, request="again", grant=3)
    ]


def test_a_program_with_turns_on_two_backends_stays_on_the_one_that_lives() -> None:
    shell = Harness(SchedulerConfig(policy="round_robin"), a=1000, b=1000)
    shell.ask("p", 100)
    shell.ask("p", 200)  # on b, and so is the program now
    assert shell.down("b") == []
    (backend,) = shell.scheduler.snapshot().backends
    assert (backend.num_reasoning, backend.num_in_flight, backend.demand_tokens) == (1, 1, 100)
    assert shell.end("p", 10) == []


def test_a_marked_program_pauses_when_its_turn_dies() -> None:
    shell = Harness(SchedulerConfig(policy="sticky"), a=100, b=200)
    shell.ask("p", 50)
    shell.ask("p", 150, request="big")
    decisions = shell.down("a")
    assert decisions == [
        Pause(program="p", backend="a"),
        Restore(program="p", backend="b", generation=1, request="big", grant=2),
    ]


def test_news_of_an_older_generation_is_ignored() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.up("a", 2000, generation=2)
    assert shell.scheduler.snapshot().num_waiting_acting == 1
    before = shell.scheduler.snapshot()
    assert shell.down("a", generation=1) == []
    assert shell.send(BackendStats(backend="a", generation=1, used_tokens=5)) == []
    assert shell.scheduler.snapshot() == before
    assert before.backends[0].capacity_tokens == 2000


def test_a_dead_backend_may_come_back_one_generation_later() -> None:
    shell = sticky(a=1000)
    shell.down("a")
    assert shell.down("a") == []  # twice is no news
    with pytest.raises(BadEvent, match="a restarted backend must count one up"):
        shell.up("a", 1000, generation=1)
    shell.ask("p", 10, request="r")
    assert shell.up("a", 1000, generation=2) == [Restore(program="p", backend="a", generation=2, request="r", grant=1)]


def test_losing_the_largest_backend_rejects_what_only_it_could_hold() -> None:
    shell = sticky(a=100, b=1000)
    shell.ask("p", 500, request="r1")
    shell.send(WeightsUpdating(backends=("b",)))
    shell.ask("p", 600, request="r2")
    shell.ask("q", 700, request="r3")
    decisions = shell.down("b")
    assert [(d.program, d.request) for d in decisions if isinstance(d, Reject)] == [("p", "r2"), ("q", "r3")]
    assert shell.scheduler.waiting_order() == ["p"]  # it ran; q never did and is forgotten


def test_requests_too_long_for_any_backend_wait_while_none_is_up() -> None:
    shell = sticky()
    assert shell.ask("p", 5000) == []
    (decision,) = shell.up("a", 1000)
    assert isinstance(decision, Reject)
    assert shell.scheduler.snapshot().num_programs == 0


def test_nothing_is_admitted_while_weights_update() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.end("p", 5)
    assert shell.send(WeightsUpdating(backends=("a",))) == []
    assert shell.ask("p", 110, request="r2") == []
    assert shell.ask("q", 50, request="r3") == []
    assert shell.ask("p", 60, request="r4") == []
    assert shell.tick(100.0) == []
    decisions = shell.send(WeightsUpdated(backends=("a",), version="2"))
    assert [decision.request for decision in decisions if isinstance(decision, Restore)] == ["r2", "r4", "r3"]


def test_a_turn_may_end_while_weights_update() -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    shell.send(WeightsUpdating(backends=("a",)))
    assert shell.end("p", 5) == []
    assert shell.scheduler.snapshot().backends[0].updating


def test_other_backends_go_on_during_an_update() -> None:
    shell = sticky(a=1000, b=1000)
    shell.send(WeightsUpdating(backends=("a",)))
    (decision,) = shell.ask("p", 100)
    assert isinstance(decision, Restore)
    assert decision.backend == "b"


def test_an_update_may_outlive_a_backend() -> None:
    shell = sticky(a=1000)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.down("a")
    assert shell.send(WeightsUpdated(backends=("a",))) == []


def test_usage_is_noted() -> None:
    shell = sticky(a=1000)
    shell.send(BackendStats(backend="a", generation=1, used_tokens=77))
    shell.send(BackendStats(backend="a", generation=1, running=3))
    assert shell.scheduler.snapshot().backends[0].used_tokens == 77


BAD: list[tuple[Event, str]] = [
    (BackendUp(backend="a", generation=1, capacity_tokens=10, max_running=1), "was up in generation 1"),
    (BackendUp(backend="a", generation=0, capacity_tokens=10, max_running=1), "was up in generation 1"),
    (BackendUp(backend="b", generation=1, capacity_tokens=0, max_running=1), "capacity_tokens=0: must be >= 1"),
    (BackendUp(backend="b", generation=1, capacity_tokens=9, max_running=0), "max_running=0: must be >= 1"),
    (
        BackendUp(backend="b", generation=1, capacity_tokens=9, max_running=1, offload_tokens=-1),
        "offload_tokens=-1: must be >= 0",
    ),
    (BackendDown(backend="b", generation=1), "backend='b' generation=1 never was up"),
    (BackendDown(backend="a", generation=2), "backend='a' generation=2 never was up"),
    (BackendStats(backend="b", generation=1), "backend='b' generation=1 never was up"),
    (WeightsUpdating(backends=("a", "b")), "WeightsUpdating.backends: backend=b never was up"),
    (WeightsUpdated(backends=("b",)), "WeightsUpdated.backends: backend=b never was up"),
]


@pytest.mark.parametrize(("event", "message"), BAD)
def test_a_bad_event_is_refused_and_changes_nothing(event: Event, message: str) -> None:
    shell = sticky(a=1000)
    shell.ask("p", 100)
    before = shell.scheduler.snapshot()
    with pytest.raises(BadEvent, match=message):
        shell.send(event)
    assert shell.scheduler.snapshot() == before


def test_a_backend_may_come_up_with_its_gate_shut() -> None:
    shell = sticky()
    shell.ask("p", 100, request="first")
    up = BackendUp(backend="a", generation=1, capacity_tokens=1000, max_running=8, updating=True)
    assert shell.send(up) == []
    assert shell.ask("q", 2000, request="large")[0] == Reject(program="q", request="large", why=ANY)
    assert [decision.request for decision in shell.send(WeightsUpdated(backends=("a",)))] == ["first"]
