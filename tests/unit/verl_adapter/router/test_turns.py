"""Which granted turns have lost their caller."""

from __future__ import annotations

from thunder_rollout.verl_adapter.router.programs import Programs
from thunder_rollout.verl_adapter.router.turns import HeldTurn, HeldTurns, orphans

RECORD, _ = Programs().recognise("p", [1, 2, 3])


def turn(grant: int, prompt_tokens: int = 100, *, server: str = "a", seen_s: float = 0.0) -> HeldTurn:
    return HeldTurn(
        record=RECORD,
        grant=grant,
        server_id=server,
        prompt_tokens=prompt_tokens,
        max_tokens=None,
        version=0,
        seen_s=seen_s,
    )


def test_of_one_request_id_the_first_granted_ends_first() -> None:
    turns = HeldTurns()
    first, second, elsewhere = turn(1), turn(2), turn(3, server="b")
    for each in (first, second, elsewhere):
        turns.add(each)
    assert (len(turns), turns.count("a")) == (3, 2)
    assert [turns.pop("a", "p") for _ in range(3)] == [first, second, None]
    assert turns.drop_all_but(["a"]) == [elsewhere]
    assert len(turns) == 0


def test_turns_are_found_by_the_length_of_their_prompt() -> None:
    turns = [turn(1, 100), turn(2, 100), turn(3, 200)]
    assert orphans(turns, (100, 200), 60.0, 60.0) == [turns[1]]
    assert [each.seen_s for each in turns] == [60.0, 0.0, 60.0]


def test_a_turn_is_given_time_to_arrive() -> None:
    turns = [turn(1, seen_s=50.0)]
    assert orphans(turns, (), 100.0, 60.0) == []
    assert orphans(turns, (), 110.0, 60.0) == turns


def test_requests_of_unknown_lengths_count_for_the_newest_turns() -> None:
    turns = [turn(1, 100), turn(2, 200), turn(3, 300)]
    assert orphans(turns, (777, 778), 60.0, 60.0) == [turns[0]]
