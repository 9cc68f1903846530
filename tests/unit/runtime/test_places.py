from __future__ import annotations

from thunder_rollout.core.decisions import Expire, Pause, Restore
from thunder_rollout.core.events import BackendDown, ProgramEnded, Tick, Withdrawn
from thunder_rollout.runtime.places import Places


def restore(program: str, backend: str) -> Restore:
    return Restore(program=program, backend=backend, generation=1)


def placed(**backends: str) -> Places:
    places = Places()
    places.note(Tick(), [restore(program, backend) for program, backend in backends.items()])
    return places


def test_a_pause_is_told_once() -> None:
    places = placed(p="a", q="a", r="b")
    places.note(Tick(), [Pause(program="p", backend="a"), Pause(program="q", backend="a")])
    assert places.take_released("a") == ("p", "q")
    assert places.take_released("a") == ()
    assert places.take_released("b") == ()


def test_whoever_ends_is_released_too_wherever_it_was() -> None:
    places = placed(p="a", q="a", r="b")
    places.note(ProgramEnded(program="p"), [])
    places.note(Withdrawn(program="q"), [])
    places.note(Withdrawn(program="r", request="r1"), [Expire(program="r")])
    places.note(ProgramEnded(program="r"), [])
    assert places.take_released("a") == ("p", "q")
    assert places.take_released("b") == ("r",)


def test_a_restore_takes_a_release_back_and_a_move_makes_one() -> None:
    places = placed(p="a", q="a")
    places.note(Tick(), [Pause(program="p", backend="a"), restore("p", "a"), restore("p", "a")])
    assert places.take_released("a") == ()
    places.note(Tick(), [restore("p", "b")])
    assert places.take_released("a") == ("p",)


def test_a_dead_backend_is_told_nothing() -> None:
    places = placed(p="a")
    places.note(Tick(), [Pause(program="p", backend="a")])
    places.note(BackendDown(backend="a", generation=1), [])
    assert places.take_released("a") == ()
