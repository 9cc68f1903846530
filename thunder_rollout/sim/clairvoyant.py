"""A schedule that knows the future: when every tool returns and how long every output will be.

It keeps or drops an acting program by what it costs: context x the time to its return, against the
seconds of prefill that its return would take x the whole pool, which stands still for it meanwhile.
Both are KV token-seconds, the currency of `core.cost`. A program is admitted where the sum of all
contexts, as they will grow turn by turn until their programs end, never passes the capacity. Where
memory is short all the same, the one with the largest ratio of the two costs goes first, as in
Belady's rule. It is greedy: a strong reference, not a proven bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from thunder_rollout.core.events import Event, ProgramEnded, Tick, TurnEnded, TurnRequested
from thunder_rollout.core.policies.base import BackendView, Placement, PolicyBase, ProgramView, View, home
from thunder_rollout.core.program import Phase
from thunder_rollout.sim.profiles import EngineProfile


@dataclass(slots=True)
class Foresight:
    """What the simulation tells ahead of time, by program: when its tool ends, its context after its
    next turn and each one that follows, and which (key, tokens) of it others have too."""

    returns_at: dict[str, float] = field(default_factory=dict)
    contexts: dict[str, list[int]] = field(default_factory=dict)
    shared: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)

    def forget(self, program: str) -> None:
        for known in (self.returns_at, self.contexts, self.shared):
            known.pop(program, None)


class ClairvoyantPolicy(PolicyBase):
    """`share` of each pool is filled by admission: programs don't advance in step, and their blocks
    are evicted where the sum of their needs is momentarily too high."""

    def __init__(self, foresight: Foresight, profile: EngineProfile, *, share: float = 1.0) -> None:
        self._foresight = foresight
        self._share = share
        self._prefill_s = lru_cache(None)(lambda thousands: profile.prefill_s(1000 * thousands))
        self._may_act = True

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is None:
            return None  # `restores` follows at once
        own = home(view, program, request.prompt_tokens)
        return own.name if own is not None else None

    def observe(self, event: Event, now: float) -> None:
        self._may_act = isinstance(event, TurnRequested | TurnEnded | ProgramEnded | Tick)

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        if not view.num_waiting_pending or not self._may_act:
            return ()
        rooms = [self._room(backend) for backend in view.open_backends()]
        placements: list[Placement] = []
        for program in view.waiting(now):
            if not program.pending or not rooms:
                break
            best = min(rooms, key=lambda room: room.rank(program))
            if not best.fits(program):
                break
            best.add(program)
            placements.append(Placement(program.program_id, best.backend.name))
        return placements

    def releases(self, view: View, now: float, *, tick: bool) -> Sequence[str]:
        victims: list[str] = []
        for backend in view.backends.values() if self._may_act else ():
            if view.num_waiting_pending or 2 * backend.bound_tokens > backend.capacity_tokens:
                victims += self._victims(backend, now, crowded=view.num_waiting_pending > 0)
        return victims

    def _victims(self, backend: BackendView, now: float, *, crowded: bool) -> list[str]:
        acting = [p for p in backend.programs.values() if p.phase is Phase.ACTING and not p.marked]
        costs = {program.program_id: self._cost(program, backend, now) for program in acting}
        victims = [name for name, cost in costs.items() if crowded and cost > 1.0]
        room = self._room(backend, without=victims)
        for program in sorted(acting, key=lambda program: -costs[program.program_id]):
            if not room.is_over:
                break
            if program.program_id not in victims:
                victims.append(program.program_id)
                room.remove(program)
        return victims

    def _cost(self, program: ProgramView, backend: BackendView, now: float) -> float:
        """Token-seconds of keeping it over token-seconds of computing it again."""
        held_s = max(0.0, self._foresight.returns_at.get(program.program_id, now) - now)
        again = self._prefill_s(1 + program.context_tokens // 1000) * backend.capacity_tokens
        return program.context_tokens * held_s / again

    def _room(self, backend: BackendView, without: Iterable[str] = ()) -> _Room:
        room = _Room(self._foresight, backend, self._share * backend.capacity_tokens)
        left_out = set(without)
        for program in backend.programs.values():
            if program.program_id not in left_out and not program.marked:
                room.add(program)
        return room


@dataclass(slots=True)
class _Room:
    """A backend's demand after every program's next turn, and each turn that follows; what is shared
    is charged once."""

    foresight: Foresight
    backend: BackendView
    limit_tokens: float
    demand_tokens: list[int] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return bool(self.demand_tokens) and self.demand_tokens[0] > self.backend.capacity_tokens

    def needs(self, program: ProgramView) -> list[int]:
        shared = self.foresight.shared.get(program.program_id, ())
        known = sum(num_tokens for key, num_tokens in shared if key in self.keys)
        return [tokens - known for tokens in self.foresight.contexts[program.program_id]]

    def add(self, program: ProgramView) -> None:
        self.demand_tokens = self._with(program)
        self.keys.update(key for key, _ in self.foresight.shared.get(program.program_id, ()))

    def remove(self, program: ProgramView) -> None:
        needs = self.needs(program)
        for index, tokens in enumerate(needs):
            self.demand_tokens[index] -= tokens

    def fits(self, program: ProgramView) -> bool:
        within = max(self._with(program)) <= self.limit_tokens
        return self.backend.fits(program.context_tokens) and (within or not self.demand_tokens)

    def rank(self, program: ProgramView) -> tuple[int, str]:
        return (max(self._with(program)), self.backend.name)

    def _with(self, program: ProgramView) -> list[int]:
        pairs = itertools.zip_longest(self.demand_tokens, self.needs(program), fillvalue=0)
        return [demand + need for demand, need in pairs]
