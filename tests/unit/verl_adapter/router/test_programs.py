"""Which program a request is of."""

from __future__ import annotations

import pytest

from thunder_rollout.verl_adapter.router.programs import HASHER_IDLE_S, HEAD_TOKENS, ProgramRecord, Programs

FIRST = list(range(100))


def turn(programs: Programs, prompt_ids: list[int], *, cut: bool = False, now: float = 0.0) -> ProgramRecord:
    """One turn from request to release."""
    record, _ = programs.recognise("p", prompt_ids)
    record.was_cut = cut
    programs.closed(record, now)
    return record


def test_a_program_goes_on_while_its_head_stays() -> None:
    programs = Programs()
    record = turn(programs, FIRST)
    for prompt_ids in (FIRST + [7] * 50, FIRST + [8] * 20, FIRST[:HEAD_TOKENS]):
        assert turn(programs, prompt_ids) is record


def test_another_head_is_another_program_and_so_is_the_first_prompt_once_more() -> None:
    programs = Programs()
    record = turn(programs, FIRST)
    other = turn(programs, [5] * 100)
    assert (other is record, record.is_over, len(programs)) == (False, True, 1)
    assert turn(programs, [5] * 100) is not other


def test_the_first_prompt_after_a_cut_is_the_same_program() -> None:
    programs = Programs()
    record = turn(programs, FIRST, cut=True)
    assert turn(programs, FIRST) is record


def test_requests_that_overlap_are_forks_of_one_program() -> None:
    programs = Programs()
    first, _ = programs.recognise("p", FIRST)
    second, _ = programs.recognise("p", FIRST)
    assert (first is second, first.num_open) == (True, 2)


def test_growth_is_learned_from_prompts_but_not_from_cut_turns() -> None:
    programs = Programs()
    record = turn(programs, FIRST)
    turn(programs, FIRST + [1] * 40)
    assert programs.expected_growth(record, None) == 40
    assert programs.expected_growth(record, 16) == 16
    turn(programs, FIRST + [1] * 40, cut=True)
    turn(programs, FIRST + [1] * 999)
    assert programs.expected_growth(record, None) == 20, "the mean of 40 and 0"


def test_an_idle_programs_prompt_is_not_kept() -> None:
    programs = Programs(block_size=16)
    record, _ = programs.recognise("p", FIRST)
    hashes = programs.request(record, FIRST).block_hashes
    programs.closed(record, 0.0)
    assert programs.idle_for(600.0, HASHER_IDLE_S) == []
    assert record.hasher is None
    record, _ = programs.recognise("p", [*FIRST, 1])
    assert programs.request(record, [*FIRST, 1]).block_hashes == hashes


@pytest.mark.parametrize("first_tokens", [100, 10])
@pytest.mark.parametrize(("prompt", "arrived_s"), [([*FIRST, 1], 5.0), ([9] * 100, 700.0)])
def test_a_program_that_was_put_away_comes_back_as_old_as_it_was(
    first_tokens: int, prompt: list[int], arrived_s: float
) -> None:
    programs = Programs()
    record, _ = programs.recognise("p", FIRST[:first_tokens], now=5.0)
    programs.closed(record, 6.0)
    programs.put_away(record)
    again, _ = programs.recognise("p", prompt, now=700.0)
    assert (again is record, programs.request(again, prompt, now=710.0).age_s) == (False, 710.0 - arrived_s)
    programs.forget(again)
    last, _ = programs.recognise("p", prompt, now=800.0)
    assert last.arrived_s == 800.0, "who is over is not remembered"


def test_so_many_that_were_put_away_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thunder_rollout.verl_adapter.router.programs.MAX_PUT_AWAY", 2)
    programs = Programs()
    for name in ("a", "b", "c"):
        record, _ = programs.recognise(name, FIRST, now=1.0)
        programs.closed(record, 1.0)
        programs.put_away(record)
    arrived = [programs.recognise(name, FIRST, now=2.0)[0].arrived_s for name in ("a", "b", "c")]
    assert arrived == [2.0, 1.0, 1.0]


def test_programs_idle_for_long_are_named_once_forgotten_never() -> None:
    programs = Programs()
    record = turn(programs, FIRST, now=5.0)
    assert programs.idle_for(600.0, 604.0) == []
    assert programs.idle_for(600.0, 605.0) == [record]
    programs.forget(record)
    assert (programs.idle_for(600.0, 700.0), len(programs)) == ([], 0)


def test_a_program_whose_name_is_another_s_now_is_not_idle_any_more() -> None:
    """Else it would be put away in the other's place."""
    programs = Programs()
    first, _ = programs.recognise("p", [1, 2, 3], now=0.0)
    programs.closed(first, 0.0)
    second, before = programs.recognise("p", [4, 5, 6], now=10.0)
    assert before is first
    programs.closed(second, 20.0)
    assert programs.idle_for(5.0, 100.0) == [second]
