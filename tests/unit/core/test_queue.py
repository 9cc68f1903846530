from __future__ import annotations

from thunder_rollout.core.events import FinishReason, TurnRequested
from thunder_rollout.core.program import Pending, Program
from thunder_rollout.core.queue import Kind, WaitingQueue


def program(name: str, prompt_tokens: int, since_s: float, *, ran: bool = False, pending: bool = True) -> Program:
    made = Program(name)
    if ran:
        ask(made, "r0", prompt_tokens, since_s)
        made.restore("b")
        made.admit("r0", 1)
        made.end_turn(1, 0, FinishReason.STOP, 0.0)
        made.pause()
    if pending:
        ask(made, "r", prompt_tokens, since_s)
    return made


def ask(made: Program, request: str, prompt_tokens: int, since_s: float) -> None:
    event = TurnRequested(program=made.program_id, request=request, prompt_tokens=prompt_tokens)
    made.request(Pending(event=event, since_s=since_s, seq=1))


def shortest_first() -> WaitingQueue:
    return WaitingQueue(lambda made: (float(made.context_tokens),), max_wait_s=10.0)


def names(queue: WaitingQueue, now: float = 0.0) -> list[str]:
    return [made.program_id for made in queue.ordered(now)]


def test_pending_programs_precede_the_others_whatever_the_key() -> None:
    queue = shortest_first()
    for made in (program("acting", 1, 0, ran=True, pending=False), program("long", 9, 0), program("short", 5, 0)):
        queue.put(made)
    assert names(queue) == ["short", "long", "acting"]
    assert (len(queue), queue.num_pending) == (3, 2)


def test_equal_keys_go_by_waiting_time_then_arrival() -> None:
    queue = shortest_first()
    for made in (program("late", 5, 2.0), program("early", 5, 1.0), program("later", 5, 2.0)):
        queue.put(made)
    assert names(queue) == ["early", "late", "later"]


def test_overdue_programs_come_first_oldest_first() -> None:
    queue = shortest_first()
    for made in (program("old", 9, 1.0), program("oldest", 8, 0.0), program("young", 1, 11.0)):
        queue.put(made)
    assert names(queue, now=10.0) == ["young", "oldest", "old"]
    assert names(queue, now=12.0) == ["oldest", "old", "young"]
    assert [made.program_id for made in queue.overdue(10.5)] == ["oldest"]


def test_put_moves_a_changed_program() -> None:
    queue = shortest_first()
    moved, other = program("moved", 9, 0, ran=True, pending=False), program("other", 5, 0)
    queue.put(moved)
    queue.put(other)
    ask(moved, "r", 3, 1.0)
    queue.put(moved)
    assert names(queue) == ["moved", "other"]
    assert [queue.count(kind) for kind in (Kind.RETURNING, Kind.NEW, Kind.ACTING)] == [1, 1, 0]


def test_a_removed_program_leaves_no_trace() -> None:
    queue = shortest_first()
    made = program("p", 5, 0)
    queue.put(made)
    assert "p" in queue
    queue.remove(made)
    assert "p" not in queue
    assert (len(queue), queue.num_pending, names(queue, now=99.0), queue.count(Kind.NEW)) == (0, 0, [], 0)
