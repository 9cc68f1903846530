"""`thunder`: the paper's scheduler (ThunderAgent, arXiv 2602.13692, section 4), as DESIGN.md states it.

Each tick restores first, then pauses:

- restore: a backend takes programs while its demand is below `low_watermark` x capacity, and never
  so that it passes `high_watermark` x capacity. Candidates in the order of the queue (returning
  reasoning programs, new ones, acting ones; each by S_restore, so short first) are chosen as
  long as they fit the total room, then placed largest first, each on the backend with the most
  room; acting programs' tokens count decayed by f(t).
- pause: a backend whose demand is above `high_watermark` x capacity gives up programs by S_pause
  (acting before reasoning, short first) until it is not; what is already marked counts as gone.

Demand is the sum of eq. 7 plus `headroom_tokens` for every bound program. Between ticks an active
program's turns go to its own backend at once, and a new program joins only if nobody waits and
there is room, on the backend with the fewest tokens.

Overdue programs are placed before all others. While the oldest can't be, the backend with the most
room is kept for it: nobody else is restored there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thunder_rollout.core.config import ThunderConfig
from thunder_rollout.core.cost import decay, demand_tokens, s_pause, s_restore
from thunder_rollout.core.events import TurnRequested
from thunder_rollout.core.policies.base import BackendView, Placement, PolicyBase, ProgramView, View, home
from thunder_rollout.core.program import Phase
from thunder_rollout.core.queue import SortKey


@dataclass(slots=True)
class _Room:
    """What one backend can still take in this tick."""

    backend: BackendView
    limit_tokens: float  # high_watermark x capacity
    target_tokens: float  # low_watermark x capacity
    demand_tokens: float

    @property
    def remaining_tokens(self) -> float:
        return self.limit_tokens - self.demand_tokens

    @property
    def rank(self) -> tuple[float, str]:
        """Smallest for the most room."""
        return (-self.remaining_tokens, self.backend.name)

    def accepts(self, headroom_tokens: int) -> bool:
        return self.demand_tokens < self.target_tokens and self.remaining_tokens > headroom_tokens


class ThunderPolicy(PolicyBase):
    def __init__(self, config: ThunderConfig) -> None:
        self._config = config

    def queue_key(self, program: ProgramView) -> SortKey:
        """Returning before new (the paper is silent), then by S_restore, highest first."""
        return (float(not program.ran), -s_restore(program.context_tokens, reasoning=bool(program.pending)))

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is not None:
            own = home(view, program, request.prompt_tokens)
            return own.name if own is not None else None
        if program.ran or view.num_waiting > 1:
            return None
        need = self._need(program)
        rooms = [self._room(backend, backend.bound_tokens) for backend in view.open_backends()]
        rooms = [room for room in rooms if self._takes(room, program, need)]
        best = min(rooms, key=lambda room: (room.backend.bound_tokens, room.backend.name), default=None)
        return best.backend.name if best is not None else None

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        if not tick or not view.num_waiting:
            return ()
        rooms = [self._room(backend, self._decayed_tokens(backend, now)) for backend in view.open_backends()]
        overdue = view.overdue(now)
        placements, rooms = self._place_overdue(overdue, rooms)
        passed = {program.program_id for program in overdue}
        others = (program for program in view.waiting(now) if program.program_id not in passed)
        return placements + self._place_batch(others, rooms)

    def releases(self, view: View, now: float, *, tick: bool) -> Sequence[str]:
        if not tick:
            return ()
        return [name for backend in view.backends.values() for name in self._victims(backend, now)]

    def _place_overdue(self, overdue: Sequence[ProgramView], rooms: list[_Room]) -> tuple[list[Placement], list[_Room]]:
        """One by one, oldest first; returns the placements and the rooms left to the others."""
        placements: list[Placement] = []
        reserved = False
        for program in overdue:
            need = self._need(program)
            fitting = [room for room in rooms if room.backend.fits(program.context_tokens)]
            if not fitting:
                continue
            room = min(fitting, key=lambda room: room.rank)
            if self._takes(room, program, need):
                room.demand_tokens += need
                placements.append(Placement(program.program_id, room.backend.name))
            elif not reserved:
                reserved = True
                rooms = [other for other in rooms if other is not room]
        return placements, rooms

    def _place_batch(self, candidates: Iterable[ProgramView], rooms: list[_Room]) -> list[Placement]:
        heap = [(room.rank, room) for room in rooms if room.accepts(self._config.headroom_tokens)]
        heapq.heapify(heap)
        total_tokens = sum(room.remaining_tokens for _, room in heap)
        placements: list[Placement] = []
        for program in sorted(self._choose(candidates, total_tokens), key=lambda program: -program.context_tokens):
            need = self._need(program)
            if not heap or not self._takes(heap[0][1], program, need):
                continue
            room = heap[0][1]
            room.demand_tokens += need
            placements.append(Placement(program.program_id, room.backend.name))
            if room.accepts(self._config.headroom_tokens):
                heapq.heapreplace(heap, (room.rank, room))
            else:
                heapq.heappop(heap)
        return placements

    def _choose(self, candidates: Iterable[ProgramView], total_tokens: float) -> list[ProgramView]:
        """As many as fit in total, in order; one that doesn't is skipped."""
        chosen: list[ProgramView] = []
        for program in candidates:
            if total_tokens <= self._config.headroom_tokens:
                break
            need = self._need(program)
            if need <= total_tokens:
                total_tokens -= need
                chosen.append(program)
        return chosen

    def _victims(self, backend: BackendView, now: float) -> list[str]:
        """Programs to pause or mark so that the demand left is within the high watermark."""
        config = self._config
        tokens: float = backend.bound_tokens
        if config.decay_when_pausing:
            tokens = self._decayed_tokens(backend, now)
        committed_tokens = backend.marked_tokens + backend.num_marked * config.headroom_tokens
        demand = tokens + backend.num_bound * config.headroom_tokens - committed_tokens
        limit = config.high_watermark * backend.capacity_tokens
        victims: list[str] = []
        if demand <= limit:
            return victims
        unmarked = [program for program in backend.programs.values() if not program.marked]
        for program in sorted(unmarked, key=_pause_order):
            if demand <= limit:
                break
            weight = self._decay(program, now) if config.decay_when_pausing else 1.0
            demand -= weight * program.context_tokens + config.headroom_tokens
            victims.append(program.program_id)
        return victims

    def _room(self, backend: BackendView, tokens: float) -> _Room:
        config = self._config
        return _Room(
            backend=backend,
            limit_tokens=config.high_watermark * backend.capacity_tokens,
            target_tokens=config.low_watermark * backend.capacity_tokens,
            demand_tokens=tokens + backend.num_bound * config.headroom_tokens,
        )

    def _takes(self, room: _Room, program: ProgramView, need_tokens: int) -> bool:
        return (
            room.accepts(self._config.headroom_tokens)
            and need_tokens <= room.remaining_tokens
            and room.backend.fits(program.context_tokens)
        )

    def _need(self, program: ProgramView) -> int:
        return program.context_tokens + self._config.headroom_tokens

    def _decayed_tokens(self, backend: BackendView, now: float) -> float:
        config = self._config
        acting = [
            (program.context_tokens, now - since_s)
            for program in backend.programs.values()
            if program.phase is Phase.ACTING and (since_s := program.acting_since_s) is not None
        ]
        return demand_tokens(backend.reasoning_tokens, acting, base=config.decay_base, unit_s=config.decay_unit_s)

    def _decay(self, program: ProgramView, now: float) -> float:
        if program.phase is not Phase.ACTING or program.acting_since_s is None:
            return 1.0
        elapsed_s = now - program.acting_since_s
        return decay(elapsed_s, base=self._config.decay_base, unit_s=self._config.decay_unit_s)


def _pause_order(program: ProgramView) -> tuple[float, str]:
    return (-s_pause(program.context_tokens, acting=program.phase is Phase.ACTING), program.program_id)
