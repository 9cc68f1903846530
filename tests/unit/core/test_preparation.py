"""How deep into the queue sandboxes are prepared, from grants and lead times."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from thunder_rollout.core.preparation import COLD_DEPTH, MAX_KINDS, MAX_STARTS, MIN_STARTS, Kind, Preparation

TOY: Kind = ("toy", False)


def play(
    preparation: Preparation, times: Iterable[float], *, lead_s: float, kind: Kind = TOY, late: bool = True
) -> list[int]:
    """Grants at these times to programs of one kind, whose starts take `lead_s`; the depths after them."""
    depths = []
    for now in times:
        preparation.note_start(kind, lead_s, preparation.note_grant(kind, now, is_late=late))
        depths.append(preparation.depth(kind))
    return depths


def warm(*, every_s: float, lead_s: float, num_grants: int = 200, max_ahead: int = 64, batch: int = 1) -> Preparation:
    """Grants come in batches; the lead time is always the same."""
    preparation = Preparation(max_ahead)
    play(preparation, (every_s * (number // batch) for number in range(num_grants)), lead_s=lead_s)
    return preparation


def test_while_nothing_is_learned_a_few_are_prepared() -> None:
    preparation = Preparation(64)
    assert (preparation.depth(TOY), preparation.expected_s(3)) == (COLD_DEPTH, 0.0)
    assert play(preparation, range(MIN_STARTS - 1), lead_s=100.0) == [COLD_DEPTH] * (MIN_STARTS - 1)
    assert Preparation(2).depth(TOY) == 2
    assert Preparation(0).depth(TOY) == 0


@pytest.mark.parametrize(("lead_s", "depth"), [(0.5, 1), (1.0, 1), (1.5, 2), (9.5, 10), (40.0, 40), (500.0, 64)])
def test_the_depth_is_the_grants_that_a_lead_time_spans(lead_s: float, depth: int) -> None:
    preparation = warm(every_s=1.0, lead_s=lead_s)
    assert preparation.depth(TOY) == depth
    assert preparation.expected_s(depth) == pytest.approx(depth), "a sandbox begun at that place is up by then"


def test_grants_in_batches_need_sandboxes_for_a_whole_batch() -> None:
    assert warm(every_s=10.0, lead_s=2.0, batch=5).depth(TOY) == 5
    assert warm(every_s=10.0, lead_s=12.0, batch=5).depth(TOY) == 10


def test_grants_all_at_once_are_prepared_for_up_to_the_bound() -> None:
    preparation = warm(every_s=0.0, lead_s=2.0, max_ahead=16)
    assert (preparation.depth(TOY), preparation.expected_s(50)) == (16, 0.0)


def test_the_depth_grows_by_one_with_each_program_that_was_late_and_shrinks_at_once() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    assert play(preparation, range(200, 240), lead_s=20.0, late=False) == [2] * 40, "nobody waited for it"
    assert play(preparation, range(240, 244), lead_s=20.0) == [3, 4, 5, 6]
    assert play(preparation, range(244, 270), lead_s=20.0)[-1] == 20
    assert play(preparation, range(270, 270 + MAX_STARTS), lead_s=2.0, late=False)[-1] == 2


def test_what_is_learned_does_not_depend_on_whether_the_grant_or_the_sandbox_came_first() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    numbers = [preparation.note_grant(TOY, float(now), is_late=True) for now in range(200, 240)]
    for number in numbers:
        preparation.note_start(TOY, 5.0, number)
    play(preparation, range(240, 250), lead_s=2.0)
    assert preparation.depth(TOY) == 5


def test_a_rare_long_start_moves_next_to_nothing_and_a_frequent_one_does() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    assert play(preparation, [200.0], lead_s=30.0) == [2], "it is known when it is over"
    assert play(preparation, range(201, 201 + MAX_STARTS), lead_s=2.0, late=False)[-1] == 2
    for now in range(400, 560):
        play(preparation, [float(now)], lead_s=30.0 if now % 5 == 0 else 2.0)
    assert preparation.depth(TOY) == 30


def test_kinds_have_depths_of_their_own_and_a_new_one_counts_as_the_slowest() -> None:
    preparation, slow = Preparation(64), ("swe", False)
    for now in range(200):
        play(preparation, [float(now)], lead_s=4.0, kind=TOY if now % 2 else slow)
        if now % 2 == 0:
            play(preparation, [float(now)], lead_s=20.0, kind=slow)
    assert (preparation.depth(TOY), preparation.depth(slow)) == (6, 30)
    assert preparation.depth(("new", False)) == 30


def test_old_kinds_are_forgotten() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    for number in range(MAX_KINDS):
        play(preparation, [200.0 + number], lead_s=1.0, kind=(f"kind{number}", False))
    assert preparation.depth(TOY) == COLD_DEPTH
