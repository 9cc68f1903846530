"""The one waiting queue, for all backends.

It holds every program that is bound to none, in the policy's restore order; programs with a
pending request always come before those without. A program that has waited longer than
`max_wait_s` is overdue: overdue programs come first of all, oldest first.

Invariant: whoever changes a queued program calls `put` again, which moves it to its place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum

from thunder_rollout.core.program import Program

SortKey = tuple[float, ...]
_Entry = tuple[bool, SortKey, float, int]  # no request pending, policy's key, since when, arrival
_Wait = tuple[float, int]  # since when, arrival


class Kind(StrEnum):
    """Why a program waits."""

    RETURNING = "returning"  # ran before and has a request pending
    NEW = "new"  # has a request pending and never ran
    ACTING = "acting"  # paused with no request pending


def kind_of(program: Program) -> Kind:
    if not program.pending:
        return Kind.ACTING
    return Kind.RETURNING if program.ran else Kind.NEW


class WaitingQueue:
    """See the module; every operation but iteration is O(log n) comparisons."""

    def __init__(self, key: Callable[[Program], SortKey], *, max_wait_s: float) -> None:
        self._key = key
        self._max_wait_s = max_wait_s
        self._programs: dict[int, Program] = {}  # by arrival
        self._arrivals: dict[str, int] = {}
        self._entries: dict[int, tuple[_Entry, _Wait | None, Kind]] = {}
        self._ordered: list[_Entry] = []
        self._waits: list[_Wait] = []
        self._kinds: Counter[Kind] = Counter()
        self._next_arrival = 0

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, program_id: str) -> bool:
        return program_id in self._arrivals

    @property
    def num_pending(self) -> int:
        """Programs here that wait for an answer to a request."""
        return len(self._waits)

    def count(self, kind: Kind) -> int:
        return self._kinds[kind]

    def put(self, program: Program, arrival: int | None = None) -> int:
        """Add the program, or move it to where its present state belongs; returns the number of its arrival. A
        queue of some programs of another one gets that one's, so that both are in the same order."""
        known = self._arrivals.get(program.program_id)
        if known is not None:
            self._take_out(known)
        elif arrival is None:
            self._next_arrival += 1
        arrival = known if known is not None else arrival if arrival is not None else self._next_arrival
        since_s = program.waiting_since_s
        entry = (since_s is None, self._key(program), since_s or 0.0, arrival)
        wait = None if since_s is None else (since_s, arrival)
        kind = kind_of(program)
        self._programs[arrival] = program
        self._arrivals[program.program_id] = arrival
        self._entries[arrival] = (entry, wait, kind)
        self._kinds[kind] += 1
        insort(self._ordered, entry)
        if wait is not None:
            insort(self._waits, wait)
        return arrival

    def remove(self, program: Program) -> None:
        self._take_out(self._arrivals.pop(program.program_id))

    def overdue(self, now: float) -> Iterator[Program]:
        """Programs whose request has waited longer than `max_wait_s`, oldest first."""
        for since_s, arrival in self._waits:
            if now - since_s <= self._max_wait_s:
                return
            yield self._programs[arrival]

    def ordered(self, now: float) -> Iterator[Program]:
        """All programs in restore order. The queue must not change while this is consumed."""
        passed: set[int] = set()
        for program in self.overdue(now):
            passed.add(self._arrivals[program.program_id])
            yield program
        for entry in self._ordered:
            if entry[-1] not in passed:
                yield self._programs[entry[-1]]

    def _take_out(self, arrival: int) -> None:
        del self._programs[arrival]
        entry, wait, kind = self._entries.pop(arrival)
        self._kinds[kind] -= 1
        del self._ordered[bisect_left(self._ordered, entry)]
        if wait is not None:
            del self._waits[bisect_left(self._waits, wait)]
