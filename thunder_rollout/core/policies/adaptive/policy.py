"""`adaptive`: program scheduling by events, exact shared-once demand and learned costs.

- admit: a waiting program is restored by the event that makes room for it. The queue is in order of
  programs' arrival, nearly complete groups ahead; the first `lookahead` are tried. One that fits
  nowhere and has waited for `patience_s` has a backend kept for it: nobody else is restored there.
- release, where demand passes `high_watermark`: programs are given up at the least expected waste
  (`victims`); what is marked already counts as gone.
- hold or release, where a program waits for room: an acting program is worth holding while the
  caching expected until it is back, c x E[t], costs less than computing it again, which holds its
  own tokens and those of the turns in flight beside it: prefill_s x (c + reasoning tokens). Those
  not worth holding are given up if together they make the room (eq. 3's currency, token-seconds).

The tick re-examines what only time changes, a slice of the backends at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
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
        num_placed = 0
        while num_placed < MAX_PLACEMENTS and (chosen := self._first_placed(view, now, roomier)) is not None:
            num_placed += 1
            yield chosen
            roomier |= self._refresh(view)

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
            yield from self._overflow(backend, account)
            if is_room_made or name not in weighed:
                continue
            released = self._not_worth_holding(backend, account)
            is_room_made = bool(released)
            yield from released

    # Inside

    def _first_placed(self, view: View, now: float, roomier: set[str]) -> Placement | None:
        """The first of the `lookahead` waiting programs that has a place. One that found none before is
        tried again only where there is more room since."""
        if not view.num_waiting_pending:
            return None
        owed: list[ProgramView] = []  # a backend, for they wait too long
        kept: set[str] = set()
        smallest_tokens: float = math.inf
        no_room_for = self._ledger.no_room_for  # tried again only where there may be room since
        self._blocked = None
        for program in islice(view.waiting(now), self._config.lookahead):
            if not program.pending:
                break
            smallest_tokens = min(smallest_tokens, program.context_tokens)
            since_s = min(pending.since_s for pending in program.pending.values())
            only = roomier if program.program_id in no_room_for and len(roomier) <= MAX_ROOMIER else None
            if only is None or only:
                self._keep(view, owed, kept)
                name = self._placer.choose(view, program, kept, only)
                if name is not None:
                    self._mean_wait_s += (now - since_s - self._mean_wait_s) / 20
                    return Placement(program.program_id, name)
                no_room_for[program.program_id] = None
            if self._blocked is None:
                self._blocked = program
            if now - since_s >= self._config.patience_s:
                owed.append(program)
        self._placer.smallest_tokens = smallest_tokens
        return None

    def _keep(self, view: View, owed: list[ProgramView], kept: set[str]) -> None:
        """Keep a backend for each of those it is owed to; one kept before and not now is given back."""
        for program in owed:
            before, name = self._kept_for.pop(program.program_id, None), self._placer.keep(view, program, kept)
            if name is not None:
                kept.add(name)
                self._kept_for[program.program_id] = name
            if before is not None and before != name:
                self._given_back.add(before)
        owed.clear()

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
        acting = (program for program in backend.programs.values() if program.phase is Phase.ACTING)
        programs = [program for program in acting if self._is_waste(program, backend, account)]
        if not programs:
            return []
        items = [self._item(program, account) for program in programs]
        need = self._placer.missing_tokens(blocked, account)
        if need <= 0 or sum(item.tokens for item in items) < need:
            return []
        return [programs[index].program_id for index in choose(items, need)]

    def _is_waste(self, program: ProgramView, backend: BackendView, account: BackendAccount) -> bool:
        """Whether holding a token of it until it is back is expected to cost more than computing it again."""
        recompute_s = self._ledger.model(account).prefill_s(1, program.context_tokens)
        beside = program.context_tokens + backend.reasoning_tokens
        return self._ledger.absence_s(program.program_id) > recompute_s * beside

    def _item(self, program: ProgramView, account: BackendAccount) -> Item:
        """Seconds to compute it again, weighted by how soon it is back and how complete its group is."""
        ledger = self._ledger
        tokens = ledger.freed_tokens(program.program_id)
        absence_s = ledger.absence_s(program.program_id)
        blocked = self._blocked
        if blocked is not None and program.arrived_s >= blocked.arrived_s:
            absence_s += self._mean_wait_s
        soon = 1.0 + account.mean_turn_s / max(absence_s, _SHORTEST_ABSENCE_S)
        complete = 1.0 + ledger.groups.complete_share(program.group)
        waste = ledger.model(account).prefill_s(tokens, program.context_tokens) * soon * complete
        return Item(tokens=tokens, waste=waste)
