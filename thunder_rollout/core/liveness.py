"""The rule that it always moves: a backend with no turn in flight admits the first program of the queue
that it can hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.program import Program
from thunder_rollout.core.state import State

MAX_MOVED = 64  # idle backends that one event sets to work


def moves(state: State, now: float) -> Iterator[tuple[Program, Backend]]:
    """Whom to restore where, at most `MAX_MOVED`; each is to be carried out before the next is asked for."""
    if not state.num_waiting_pending or not state.has_idle_backend():
        return
    num_moved = 0
    for backend in state.idle_backends():
        waiting = takewhile(lambda program: program.pending, state.waiting(now))
        first = next((program for program in waiting if backend.fits(program.context_tokens)), None)
        if first is not None:
            yield first, backend
            num_moved += 1
            if num_moved == MAX_MOVED:
                return
