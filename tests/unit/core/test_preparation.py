"""How deep into the queue sandboxes are prepared, from grants and lead times."""

from __future__ import annotations

import pytest

from thunder_rollout.core.preparation import COLD_DEPTH, MAX_KINDS, MIN_GRANTS, Kind, Preparation

TOY: Kind = ("toy", False)


def warm(*, every_s: float, lead_s: float, num_grants: int = 60, max_ahead: int = 64, batch: int = 1) -> Preparation:
    """Grants come in batches; the kind's lead time is always the same."""
    preparation = Preparation(max_ahead)
    for number in range(num_grants):
        preparation.note_grant(every_s * (number // batch))
        preparation.note_lead(TOY, lead_s)
        preparation.depth(TOY)
    return preparation


def test_while_nothing_is_learned_a_few_are_prepared() -> None:
    preparation = Preparation(64)
    assert preparation.depth(TOY) == COLD_DEPTH
    assert preparation.expected_s(3) == 0.0
    preparation.note_lead(TOY, 100.0)
    for number in range(MIN_GRANTS - 1):
        preparation.note_grant(float(number))
        assert preparation.depth(TOY) == COLD_DEPTH


@pytest.mark.parametrize(("lead_s", "depth"), [(0.5, 1), (1.0, 1), (1.5, 2), (9.5, 10), (40.0, 40), (500.0, 64)])
def test_the_depth_is_the_grants_that_a_lead_time_spans(lead_s: float, depth: int) -> None:
    preparation = warm(every_s=1.0, lead_s=lead_s, num_grants=100)
    assert preparation.depth(TOY) == depth
    assert preparation.expected_s(depth) >= min(lead_s, 64.0), "a sandbox begun at that place is up by then"


def test_grants_in_batches_need_sandboxes_for_a_whole_batch() -> None:
    assert warm(every_s=10.0, lead_s=2.0, batch=5).depth(TOY) == 5
    assert warm(every_s=10.0, lead_s=12.0, batch=5).depth(TOY) == 10


def test_grants_all_at_once_are_prepared_for_up_to_the_bound() -> None:
    assert warm(every_s=0.0, lead_s=2.0, max_ahead=16).depth(TOY) == 16
    assert warm(every_s=0.0, lead_s=2.0).expected_s(50) == 0.0


def test_the_depth_grows_by_one_a_grant_and_shrinks_at_once() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    for _ in range(32):
        preparation.note_lead(TOY, 20.0)
    depths = []
    for number in range(60, 64):
        preparation.note_grant(float(number))
        depths.append(preparation.depth(TOY))
    assert depths == [3, 4, 5, 6]
    for _ in range(32):
        preparation.note_lead(TOY, 2.0)
    preparation.note_grant(64.0)
    assert preparation.depth(TOY) == 2


def test_a_rare_long_start_moves_nothing_and_a_frequent_one_does() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    preparation.note_lead(TOY, 30.0)
    preparation.note_grant(60.0)
    assert preparation.depth(TOY) == 2
    for number in range(61, 131):
        preparation.note_lead(TOY, 30.0 if number % 5 == 0 else 2.0)
        preparation.note_grant(float(number))
        preparation.depth(TOY)
    assert preparation.depth(TOY) == 30


def test_kinds_have_depths_of_their_own_and_a_new_one_counts_as_the_slowest() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    slow: Kind = ("swe", False)
    preparation.note_lead(slow, 20.0)
    for number in range(60, 90):
        preparation.note_grant(float(number))
        preparation.depth(slow)
        preparation.depth(("new", False))
    assert (preparation.depth(TOY), preparation.depth(slow)) == (2, 20)
    assert preparation.depth(("new", False)) == 20


def test_old_kinds_are_forgotten() -> None:
    preparation = warm(every_s=1.0, lead_s=2.0)
    for number in range(MAX_KINDS):
        preparation.note_lead((f"kind{number}", False), 1.0)
    assert preparation.depth(TOY) == min(COLD_DEPTH, 1)
