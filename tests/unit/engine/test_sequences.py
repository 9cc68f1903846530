from __future__ import annotations

import pytest

from thunder_rollout.engine import sequences
from thunder_rollout.engine.sequences import Sequences


def released(known: Sequences[int], *programs: str) -> list[int]:
    for program in programs:
        known.release(program)
    return known.take_released()


def test_what_no_other_has_comes_last_block_first() -> None:
    known = Sequences[int]()
    known.put("p", [1, 2, 3, 4])
    known.put("q", [1, 2, 5])
    assert released(known, "p") == [4, 3]
    assert released(known, "p") == []
    assert released(known, "q") == [5, 2, 1]


def test_those_released_last_are_lost_first() -> None:
    known = Sequences[int]()
    known.put("p", [1, 2, 3])
    known.put("q", [1, 2, 5])
    assert released(known, "p", "q") == [5, 3, 2, 1]


def test_whoever_comes_back_keeps_what_it_has() -> None:
    known = Sequences[int]()
    known.put("p", [1, 2])
    known.release("p")
    assert known.has_released
    known.begin("p")
    known.begin("never seen")
    assert not known.has_released
    assert known.take_released() == []
    assert released(known, "p") == [2, 1]


def test_a_sequence_grows_forks_or_shrinks() -> None:
    known = Sequences[int]()
    for hashes in ([1, 2], [1, 2, 3], [1, 7, 8, 9], [1, 7]):
        known.put("p", hashes)
    known.put("q", [1, 2, 3])
    assert released(known, "q") == [3, 2]
    assert released(known, "p") == [7, 1]
    assert released(known, "never seen") == []


def test_the_oldest_are_forgotten_where_nobody_releases_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_PROGRAMS", 2)
    known = Sequences[int]()
    known.put("q", [1, 20])
    known.release("q")
    for name, own in (("p", 10), ("p", 11), ("r", 30)):
        known.put(name, [1, own])
    assert released(known, "q") == []
    assert released(known, "p") == [11]
    assert released(known, "r") == [30, 1]
