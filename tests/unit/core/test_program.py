from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from thunder_rollout.core.events import FinishReason, TurnRequested
from thunder_rollout.core.program import HISTORY_LENGTH, Pending, Phase, Program, SandboxNeed, Status
from thunder_rollout.errors import InvalidTransition


def ask(program: Program, request: str, prompt_tokens: int, *, sandbox: bool = False) -> None:
    event = TurnRequested(program=program.program_id, request=request, prompt_tokens=prompt_tokens, sandbox=sandbox)
    program.request(Pending(event=event, since_s=1.0, seq=1))


def running(prompt_tokens: int = 100) -> Program:
    program = Program("p")
    ask(program, "r1", prompt_tokens)
    program.restore("b")
    program.admit("r1", 1)
    return program


def test_a_program_reasons_until_its_last_turn_ends() -> None:
    program = running()
    assert (program.status, program.phase, program.ran) == (Status.ACTIVE, Phase.REASONING, True)
    program.end_turn(1, 50, FinishReason.STOP, 7.0)
    assert (program.phase, program.acting_since_s, program.context_tokens) == (Phase.ACTING, 7.0, 150)


@pytest.mark.parametrize("finish_reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_turn_that_was_cut_starts_no_tool(finish_reason: FinishReason) -> None:
    program = running()
    program.end_turn(1, 50, finish_reason, 7.0)
    assert program.phase is Phase.REASONING


def test_with_several_turns_it_acts_after_the_last() -> None:
    program = running()
    ask(program, "r2", 300)
    program.admit("r2", 2)
    program.end_turn(2, 10, FinishReason.STOP, 5.0)
    assert program.phase is Phase.REASONING
    program.end_turn(1, 20, FinishReason.LENGTH, 6.0)
    assert (program.phase, program.context_tokens) == (Phase.ACTING, 120)


def test_context_follows_request_progress_and_end() -> None:
    program = running(100)
    program.progress(1, 40)
    assert program.context_tokens == 140
    program.progress(1, 30)  # late
    assert program.context_tokens == 140
    program.end_turn(1, None, FinishReason.STOP, 1.0)
    assert program.context_tokens == 140
    ask(program, "r2", 60)  # history was edited
    assert program.context_tokens == 60
    program.drop_request("r2")
    assert program.context_tokens == 140
    assert program.phase is Phase.ACTING


def test_a_void_turn_leaves_its_tokens_and_no_tool() -> None:
    program = running(100)
    program.start_turn(1)
    program.progress(1, 5)
    program.void_turn(1)
    program.pause()
    assert (program.context_tokens, program.phase, program.status) == (105, Phase.REASONING, Status.PAUSED)


def test_requests_are_found_by_name() -> None:
    program = running()
    ask(program, "r2", 10)
    assert program.is_open("r1")
    assert program.is_open("r2")
    assert not program.is_open("r3")
    assert program.grant_of("r1") == 1
    assert program.waiting_since_s == 1.0


ILLEGAL: list[Callable[[Program], None]] = [
    lambda program: program.restore("c"),
    lambda program: program.pause(),
    lambda program: program.admit("r1", 2),
    lambda program: program.drop_request("r9"),
    lambda program: program.start_turn(9),
    lambda program: program.progress(9, 1),
    lambda program: program.void_turn(9),
    lambda program: program.end_turn(9, 1, FinishReason.STOP, 1.0),
    lambda program: ask(program, "r1", 5),
    lambda program: program.sandbox_prepared(0.0),
]


@pytest.mark.parametrize("change", ILLEGAL)
def test_illegal_transitions_tell_the_history(change: Callable[[Program], None]) -> None:
    program = running()
    with pytest.raises(InvalidTransition, match=r"program=p: .* history: request r1; restore b; admit r1 as 1"):
        change(program)


def test_a_paused_program_can_neither_move_nor_be_marked_nor_pause() -> None:
    program = Program("p")
    for change in (lambda: program.move("b"), program.mark, program.pause):
        with pytest.raises(InvalidTransition, match="history: none"):
            change()


def test_a_mark_is_set_once_and_cleared_by_the_pause() -> None:
    program = running()
    program.mark()
    with pytest.raises(InvalidTransition):
        program.mark()
    program.end_turn(1, 1, FinishReason.STOP, 1.0)
    program.pause()
    assert not program.marked


def test_a_terminated_program_stays_so() -> None:
    program = running()
    program.terminate()
    assert (program.status, program.backend, program.turns) == (Status.TERMINATED, None, {})
    with pytest.raises(InvalidTransition):
        program.terminate()
    with pytest.raises(InvalidTransition):
        ask(program, "r2", 1)


def test_a_sandbox_is_wanted_once_and_again_after_it_failed() -> None:
    program = Program("p")
    program.sandbox_failed()
    assert program.sandbox is SandboxNeed.NONE
    ask(program, "r1", 10, sandbox=True)
    program.sandbox_prepared(0.0)
    ask(program, "r2", 10, sandbox=True)
    assert program.sandbox is SandboxNeed.PREPARED
    program.sandbox_failed()
    ask(program, "r3", 10, sandbox=True)
    assert program.sandbox is SandboxNeed.WANTED
    assert program.sandbox_issued


def test_tools_come_and_go() -> None:
    program = running()
    program.start_tool("bash")
    assert program.tool == "bash"
    program.end_tool()
    assert program.tool is None


def test_history_is_bounded() -> None:
    program = running()
    for index in range(100):
        program.move(f"b{index}")
    assert len(program.history()) == HISTORY_LENGTH
    assert program.history()[-1] == "move b99"


def test_the_error_survives_pickling() -> None:
    with pytest.raises(InvalidTransition) as caught:
        Program("p").pause()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
