"""What deaths of engines make of one turn."""

from __future__ import annotations

import pickle

from thunder_rollout.errors import EngineDied
from thunder_rollout.runtime.suspicion import Suspicion


def after(*deaths: EngineDied) -> Suspicion:
    suspicion = Suspicion()
    for death in deaths:
        assert not suspicion.is_proved
        suspicion.add(pickle.loads(pickle.dumps(death)))
    return suspicion


def failed(num_together: int) -> EngineDied:
    return EngineDied("it crashed", by_turn=True, num_together=num_together)


def test_companies_shrink_to_an_eighth_and_who_fails_alone_under_suspicion_is_found_out() -> None:
    deaths = [failed(256), failed(30), failed(3), failed(1)]
    assert [after(*deaths[:number]).max_together for number in range(4)] == [None, 32, 3, 1]
    assert not after(*deaths[:3]).is_proved
    assert (after(*deaths).is_proved, after(*deaths).num_deaths) == (True, 4)


def test_a_turn_that_was_alone_by_chance_is_given_another_try() -> None:
    assert not after(failed(1)).is_proved
    assert after(failed(1), failed(1)).is_proved


def test_an_engine_that_was_killed_leaves_everything_as_it_was() -> None:
    killed = EngineDied("it was killed", num_together=8)
    assert after(killed, killed) == Suspicion()
    assert after(failed(8), killed, killed).max_together == 1
    assert not after(failed(8), killed, killed).is_proved
