from __future__ import annotations

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.events import FinishReason, TurnRequested
from thunder_rollout.core.program import Pending, Program


def backend() -> Backend:
    return Backend("b", generation=1, capacity_tokens=1000, max_running=4)


def reasoning(name: str, prompt_tokens: int) -> Program:
    program = Program(name)
    event = TurnRequested(program=name, request="r", prompt_tokens=prompt_tokens)
    program.request(Pending(event=event, since_s=0.0, seq=1))
    program.restore("b")
    program.admit("r", 1)
    return program


def test_sums_follow_the_programs() -> None:
    pool, first, second = backend(), reasoning("p", 100), reasoning("q", 50)
    pool.bind(first)
    pool.bind(second)
    assert (pool.reasoning_tokens, pool.acting_tokens, pool.num_bound) == (150, 0, 2)
    first.mark()
    pool.refresh(first)
    assert (pool.marked_tokens, pool.num_marked) == (100, 1)
    second.end_turn(1, 25, FinishReason.STOP, 3.0)
    pool.refresh(second)
    assert (pool.reasoning_tokens, pool.acting_tokens, pool.num_reasoning, pool.num_acting) == (100, 75, 1, 1)
    assert pool.bound_tokens == 175
    pool.unbind(first)
    pool.unbind(second)
    assert (pool.bound_tokens, pool.marked_tokens, pool.num_acting, pool.num_marked, pool.num_bound) == (0, 0, 0, 0, 0)


def test_a_context_fits_with_one_token_to_spare() -> None:
    assert backend().fits(999)
    assert not backend().fits(1000)
