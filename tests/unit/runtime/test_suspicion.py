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


def killed(num_together: int | None) -> EngineDied:
    return EngineDied("it was killed", num_together=num_together)


def test_a_few_kills_leave_everything_as_it_was() -> None:
    assert after(*[killed(8)] * 3).max_together is None
    assert after(failed(200), *[killed(8)] * 3).max_together == 25
    assert not after(failed(8), *[killed(1)] * 3).is_proved


def test_whom_engines_are_killed_under_again_and_again_is_found_out_alone_and_late() -> None:
    deaths = [*[killed(256)] * 4, killed(32), killed(4), *[killed(1)] * 5]
    assert [after(*deaths[:number]).max_together for number in range(3, 8)] == [None, 32, 4, 1, 1]
    assert not after(*deaths[:10]).is_proved, "ten kills in a row condemn nobody"
    assert after(*deaths).is_proved
    assert not after(*[killed(256)] * 20).is_proved, "it never ran alone"


def test_where_nobody_knows_how_many_ran_companies_shrink_all_the_same() -> None:
    deaths = [killed(None)] * 11
    assert [after(*deaths[:number]).max_together for number in (3, 4, 5, 6)] == [None, 32, 4, 1]
    assert after(*deaths).is_proved


def test_a_death_under_which_it_did_not_run_says_nothing() -> None:
    assert after(*[killed(0)] * 20) == Suspicion()
