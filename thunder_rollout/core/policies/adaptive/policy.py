"""`adaptive`: program scheduling by events, exact shared-once demand and learned costs.

- admit: a waiting program is restored by the event that makes room for it. The queue is in order of
  programs' arrival, nearly complete groups ahead; the first `lookahead` are tried. One that fits
  nowhere and has waited for `patience_s` has a backend kept for it: nobody else is restored there.
- release, where demand passes `high_watermark`: programs are given up at the least expected waste
  (`victims`); what is marked already counts as gone.
- hold or release, where a program waits for room: an acting program is worth holding while the
  caching expected until it is back, c x E[t], costs less than having it again: computing it holds its
  own tokens and those of the turns in flight beside it, prefill_s x (c + reasoning tokens), loading
  what a host tier has goes on beside them, load_s x c. Those
  not worth holding are given up if together they make the room (eq. 3's currency, token-seconds).

The tick re-examines what only time changes, a slice of the backends at a time. Where programs may end without
a word, those not worth holding go then whoever waits, for they may be gone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from thunder_rollout.core.config import AdaptiveConfig
from thunder_rollout.core.events import Event, TurnRequested, WeightsUpdated, WeightsUpdating
from thunder_rollout.core.policies.adaptive.accounts import BackendAccount
from thunder_rollout.core.policies.adaptive.ledger import Ledger
from thunder_rollout.core.policies.adaptive.placement import Placer
from thunder_rollout.core.policies.adaptive.victims import Item, choose
from thunder_rollout.core.policies.base import BackendView, Placement, PolicyBase, ProgramView, View, home
from thunder_rollout.core.program import Phase, Status
from thunder_rollout.core.queue import SortKey

TICK_SLICE = 32  # backends re-examined by one tick
MAX_PLACEMENTS = 64  # programs placed by one event; the rest follow with the next
MAX_ROOMIER = 8  # backends with more room that are tried one by one; beyond, candidates anew
MAX_GIVEN_UP = 512  # programs whose place is given up for an update by one event; so do the others
_SHORTEST_ABSENCE_S = 1e-3


@dataclass(slots=True)
class _Look:
    """One event's look at the queue, from its head."""

    roomier: set[str]  # backends that may have more room since the last look
    passed: set[str] = field(default_factory=set)  # programs that found no place
    owed: list[ProgramView] = field(default_factory=list)  # those of them that a backend is to be kept for
    kept: set[str] = field(default_factory=set)  # backends kept already
    smallest_tokens: float = math.inf  # context of the smallest that was passed


class AdaptivePolicy(PolicyBase):
    def __init__(self, config: AdaptiveConfig) -> None:
        self._config = config
        self._ledger = Ledger(config)
        self._placer = Placer(config, self._ledger)
        self._blocked: ProgramView | None = None  # the first waiting program that found no room
        self._last_blocked: str | None = None  # for whom room was last looked for
        self._kept_for: dict[str, str] = {}  # backend by the waiting program it is kept for
        self._given_back: set[str] = set()  # backends that are not kept any more
        self._updating: list[str] = []  # backends whose programs are to be given up
        self._examine: dict[str, None] = {}
        self._slice_start = 0
        self._mean_wait_s = 0.0

    def queue_key(self, program: ProgramView) -> SortKey:
        ahead_s = self._config.group_weight_s * self._ledger.groups.complete_share(program.group)
        return (program.arrived_s - ahead_s,)

    def begin(self, now: float) -> None:
        self._ledger.begin(now)

    def accept(self, request: TurnRequested) -> TurnRequested:
        return self._ledger.accept(request)

    def changed(self, program: ProgramView) -> None:
        self._ledger.changed(program)
        if program.program_id in self._kept_for and (
            program.backend is not None or program.status is Status.TERMINATED
        ):
            self._given_back.add(self._kept_for.pop(program.program_id))

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        self._ledger.granted(program, request, backend, grant)

    def observe(self, event: Event, now: float) -> None:
        self._ledger.observe(event)
        if isinstance(event, WeightsUpdating | WeightsUpdated):
            self._ledger.touched.update(dict.fromkeys(event.backends))
        if isinstance(event, WeightsUpdating) and self._config.rebalance_on_update:
            self._updating += event.backends

    def reordered(self) -> Collection[str]:
        names, self._ledger.groups.reordered = self._ledger.groups.reordered, []
        return names

    def drift_tokens(self, backend: str) -> int | None:
        return self._ledger.backends[backend].drift_tokens

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is None:
            return None
        own = home(view, program, request.prompt_tokens)
        return own.name if own is not None else None

    def restores(self, view: View, now: float, *, tick: bool) -> Iterator[Placement]:
        roomier = self._refresh(view) | self._given_back
        self._given_back = set()
        if tick:
            self._ledger.no_room_for.clear()
        elif not roomier and not self._ledger.queue_changed:
            return
        self._ledger.queue_changed = False
        self._blocked = None
        look = _Look(roomier)
        for _ in range(MAX_PLACEMENTS):
            chosen = self._next_placed(view, now, look)
            if chosen is None:
                return
            yield chosen
            look.roomier |= self._refresh(view)

    def releases(self, view: View, now: float, *, tick: bool) -> Iterator[str]:
        yield from self._give_up_places(view)
        weighed = self._to_weigh(view, tick=tick)
        self._refresh(view)
        examined, self._examine = {**self._examine, **weighed}, {}
        is_room_made = self._blocked is None
        for name in examined:
            if name not in view.backends:
                continue
            backend, account = view.backends[name], self._ledger.backends[name]
            if tick and self._config.silent_ends:
                yield from [program.program_id for program in self._waste(backend, account)]
            yield from self._overflow(backend, account)
            if is_room_made or name not in weighed:
                continue
            released = self._not_worth_holding(backend, account)
            is_room_made = bool(released)
            yield from released

    # Inside

    def _next_placed(self, view: View, now: float, look: _Look) -> Placement | None:
        """The next of the `lookahead` waiting programs that has a place. One that found none in an earlier
        event is tried again only where there may be room since."""
        if not view.num_waiting_pending:
            return None
        no_room_for = self._ledger.no_room_for
        for program in islice(view.waiting(now), self._config.lookahead):
            if not program.pending:
                break
            if program.program_id in look.passed:
                continue
            since_s = min(pending.since_s for pending in program.pending.values())
            again = program.program_id in no_room_for and len(look.roomier) <= MAX_ROOMIER
            if not again or look.roomier:
                self._keep(view, look)
                name = self._placer.choose(view, program, look.kept, look.roomier if again else None)
                if name is not None:
                    self._mean_wait_s += (now - since_s - self._mean_wait_s) / 20
                    return Placement(program.program_id, name)
                no_room_for[program.program_id] = None
            look.passed.add(program.program_id)
            look.smallest_tokens = min(look.smallest_tokens, program.context_tokens)
            if self._blocked is None:
                self._blocked = program
            if now - since_s >= self._config.patience_s:
                look.owed.append(program)
        self._placer.smallest_tokens = look.smallest_tokens
        return None

    def _keep(self, view: View, look: _Look) -> None:
        """Keep a backend for each of those it is owed to; one kept before and not now is given back."""
        for program in look.owed:
            before, name = self._kept_for.pop(program.program_id, None), self._placer.keep(view, program, look.kept)
            if name is not None:
                look.kept.add(name)
                self._kept_for[program.program_id] = name
            if before is not None and before != name:
                self._given_back.add(before)
        look.owed.clear()

    def _give_up_places(self, view: View) -> list[str]:
        """Programs of backends that update their weights, some with each event."""
        names: list[str] = []
        while self._updating and len(names) < MAX_GIVEN_UP:
            backend = view.backends.get(self._updating[-1])
            self._updating.pop()
            if backend is not None and backend.updating:
                names += [program.program_id for program in backend.programs.values() if not program.marked]
        return names

    def _refresh(self, view: View) -> set[str]:
        """Rank what was touched anew; returns the backends with more room than when last looked at."""
        touched = self._ledger.touched
        roomier = {name for name in touched if self._placer.refresh(view, name)}
        self._examine.update(touched)
        touched.clear()
        return roomier

    def _to_weigh(self, view: View, *, tick: bool) -> dict[str, None]:
        """Backends where holding may have become a waste: another program acts, another one waits for
        room, or time has passed."""
        names, self._ledger.began_acting = self._ledger.began_acting, {}
        blocked = self._blocked.program_id if self._blocked is not None else None
        if blocked != self._last_blocked:
            names.update(dict.fromkeys(self._placer.roomiest()))
        self._last_blocked = blocked
        if tick:
            every = list(view.backends)
            start = self._slice_start if self._slice_start < len(every) else 0
            for name in every[start : start + TICK_SLICE]:
                names[name] = None
                self._ledger.backends[name].refusal = None
            self._slice_start = start + TICK_SLICE
        return names

    def _overflow(self, backend: BackendView, account: BackendAccount) -> list[str]:
        ledger = self._ledger
        limit = self._config.high_watermark * account.capacity_tokens
        need = ledger.demand_tokens(account) - limit
        if need <= 0 or backend.num_bound - backend.num_marked <= 1:
            return []
        need -= sum(ledger.freed_tokens(p.program_id) for p in backend.programs.values() if p.marked)
        programs = [program for program in backend.programs.values() if not program.marked]
        items = [self._item(program, account) for program in programs]
        price = min((item.waste / item.tokens for item in items if item.tokens > 0), default=0.0)
        return [programs[index].program_id for index in choose(items, need, overshoot_price=price)]

    def _not_worth_holding(self, backend: BackendView, account: BackendAccount) -> list[str]:
        blocked = self._blocked
        assert blocked is not None
        if backend.updating or not backend.fits(blocked.context_tokens):
            return []
        programs = self._waste(backend, account)
        if not programs:
            return []
        items = [self._item(program, account) for program in programs]
        need = self._placer.missing_tokens(blocked, account)
        if need <= 0 or sum(item.tokens for item in items) < need:
            return []
        return [programs[index].program_id for index in choose(items, need)]

    def _waste(self, backend: BackendView, account: BackendAccount) -> list[ProgramView]:
        """The programs there that are not worth holding for somebody who waits."""
        acting = (program for program in backend.programs.values() if program.phase is Phase.ACTING)
        return [program for program in acting if self._is_waste(program, backend, account)]

    def _is_waste(self, program: ProgramView, backend: BackendView, account: BackendAccount) -> bool:
        """Whether holding a token of it until it is back is expected to cost more than having it again."""
        tokens = program.context_tokens
        recompute_s, load_s = self._ledger.again_s(program, tokens, account)
        beside = (tokens + backend.reasoning_tokens) / tokens
        return self._ledger.absence_s(program.program_id) > recompute_s * beside + load_s

    def _item(self, program: ProgramView, account: BackendAccount) -> Item:
        """Seconds to load it or compute it again, weighted by how soon it is back and how complete its group is."""
        ledger = self._ledger
        tokens = ledger.freed_tokens(program.program_id)
        absence_s = ledger.absence_s(program.program_id)
        blocked = self._blocked
        if blocked is not None and program.arrived_s >= blocked.arrived_s:
            absence_s += self._mean_wait_s
        soon = 1.0 + account.mean_turn_s / max(absence_s, _SHORTEST_ABSENCE_S)
        complete = 1.0 + ledger.groups.complete_share(program.group)
        waste = sum(ledger.again_s(program, tokens, account)) * soon * complete
        return Item(tokens=tokens, waste=waste)
