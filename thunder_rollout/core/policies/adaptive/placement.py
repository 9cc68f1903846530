"""Where a waiting program goes: the backend with room that costs least.

Cost is seconds: to load or prefill what the backend does not hold, and the service that the programs bound
there ask of it. Where that is equal, the fewest turns in flight, then the name, decide; a program's
last backend wins ties. Only a few backends are looked at: those with the least load, those with the
most room, those that hold the program's prefix, and its last one. A program that its last backend can load from a
host tier waits for that one a while, rather than be computed where there is room.

Room is judged twice. Demand with the program must be within `admit_watermark` now, and the most that
all programs there are expected to need at once, as they grow and leave, within a share of capacity
between `least_fill` and `most_fill`: passing it means computing something again, which pays where one
more program adds to throughput, and does not where the engine is busy anyway. Where a host tier makes
it cheap, the peak counts for as much less.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from itertools import islice

from thunder_rollout.core.config import AdaptiveConfig
from thunder_rollout.core.policies.adaptive.accounts import BackendAccount, Refusal
from thunder_rollout.core.policies.adaptive.ledger import Ledger
from thunder_rollout.core.policies.base import ProgramView, View

NUM_PROBES = 3  # backends looked at by least load, and as many by most room

_Rank = tuple[float, float, float, str]


class Ranking:
    """Names in order of a key that changes."""

    def __init__(self) -> None:
        self._ranks: dict[str, _Rank] = {}
        self._ordered: list[_Rank] = []

    def __contains__(self, name: str) -> bool:
        return name in self._ranks

    def __iter__(self) -> Iterator[str]:
        return (rank[-1] for rank in self._ordered)

    def put(self, name: str, *key: float) -> None:
        first, second, third = key
        self.discard(name)
        rank = self._ranks[name] = (first, second, third, name)
        insort(self._ordered, rank)

    def discard(self, name: str) -> None:
        rank = self._ranks.pop(name, None)
        if rank is not None:
            del self._ordered[bisect_left(self._ordered, rank)]


class Placer:
    def __init__(self, config: AdaptiveConfig, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._by_load = Ranking()
        self._by_room = Ranking()
        self.smallest_tokens = 0.0  # context of the smallest of those that wait and are looked at

    def refresh(self, view: View, name: str) -> bool:
        """The backend's demand, load or openness changed; returns whether it may have room for one of
        those that wait."""
        backend, account = view.backends.get(name), self._ledger.backends[name]
        if backend is None or backend.updating:
            self._by_load.discard(name)
            self._by_room.discard(name)
            account.refusal = None
            return False
        in_flight = account.clock.num_in_flight
        self._by_load.put(name, in_flight + account.num_bound, in_flight, account.num_bound)
        demand = self._ledger.demand_tokens(account)
        self._by_room.put(name, demand - account.capacity_tokens, in_flight, 0)
        refusal = account.refusal
        if refusal is not None and refusal.room_now_tokens(demand, account.curve) < self.smallest_tokens:
            return False
        account.refusal = None
        return True

    def choose(
        self, view: View, program: ProgramView, kept: Collection[str], only: Collection[str] | None
    ) -> str | None:
        """The backend to restore it on, one of `only` (None: any) and not of `kept`; None where none
        has room for it, or where it would rather wait for the one whose host tier holds it."""
        best: str | None = None
        best_cost: tuple[float, int, int, str] | None = None
        home = self._tiered_home(view, program)
        for name in self._candidates(program, kept) if only is None else only:
            backend = view.backends.get(name)
            if backend is None or backend.updating or not backend.fits(program.context_tokens):
                continue
            account = self._ledger.backends[name]
            if name in kept or not self._may_run(program, account):
                self._refuse(account, math.inf)
                continue
            missing = self.missing_tokens(program, account)
            if missing > 0:
                self._refuse(account, program.context_tokens - missing)
                continue
            if home is not None and self._is_dear(program, account, home):
                continue
            cost = self._cost(program, account)
            if best_cost is None or cost < best_cost:
                best, best_cost = name, cost
        return best

    def keep(self, view: View, program: ProgramView, kept: Collection[str]) -> str | None:
        """The backend to keep for a program that none has room for: of those that can hold it and are not
        kept already, the one with the most room."""
        names = (name for name in self._by_room if name not in kept)
        return next((name for name in names if view.backends[name].fits(program.context_tokens)), None)

    def roomiest(self) -> list[str]:
        return list(islice(self._by_room, NUM_PROBES))

    def missing_tokens(self, program: ProgramView, account: BackendAccount) -> float:
        """What would have to be given up there for the program to have room; not above 0 if it has."""
        config, ledger = self._config, self._ledger
        added = ledger.added_tokens(program, account.name)
        now = ledger.demand_tokens(account) + added - config.admit_watermark * account.capacity_tokens
        share = config.least_fill + (config.most_fill - config.least_fill) * ledger.gain(account)
        peak = ledger.peak_tokens(program, account, added) * ledger.loss_share(program, account)
        return max(now, peak - share * account.capacity_tokens)

    def _tiered_home(self, view: View, program: ProgramView) -> BackendAccount | None:
        """Where it ran last, if that is open and may have it in a host tier."""
        last = self._ledger.programs[program.program_id].last_backend
        backend = view.backends.get(last) if last is not None else None
        if backend is None or backend.updating or not backend.fits(program.context_tokens):
            return None
        account = self._ledger.backends[backend.name]
        return account if account.offload_tokens else None

    def _is_dear(self, program: ProgramView, account: BackendAccount, home: BackendAccount) -> bool:
        """Whether it waits for its home, though there is room here: no longer than all the turns in flight
        here would together be held up by computing it."""
        if account is home:
            return False
        ledger = self._ledger
        waiting = ledger.programs[program.program_id]
        if waiting.spared_since_s is None:
            waiting.spared_since_s = ledger.now
        saved_s = ledger.prefill_s(program, account) - ledger.prefill_s(program, home)
        return ledger.now - waiting.spared_since_s < saved_s * (1 + account.clock.num_in_flight)

    def _may_run(self, program: ProgramView, account: BackendAccount) -> bool:
        """As far as its running sequences and what it computes again are concerned."""
        if account.clock.num_in_flight + len(program.pending) > account.max_running:
            return False
        refill = account.refill_tokens + program.context_tokens
        allowed = max(program.context_tokens, self._config.max_refill_share * account.capacity_tokens)
        return not program.ran or refill <= allowed

    def _refuse(self, account: BackendAccount, room_tokens: float) -> None:
        """A context of `room_tokens` would have had room; what was refused before counts from now on too."""
        demand, before = self._ledger.demand_tokens(account), account.refusal
        if before is not None:
            room_tokens = max(room_tokens, before.room_now_tokens(demand, account.curve))
        account.refusal = Refusal(demand, account.curve, room_tokens)

    def _candidates(self, program: ProgramView, kept: Collection[str]) -> dict[str, None]:
        ledger = self._ledger
        last = ledger.programs[program.program_id].last_backend
        names = dict.fromkeys(() if last is None else (last,))
        names.update(dict.fromkeys(islice(ledger.tree.holders(program.program_id), NUM_PROBES)))
        for ranking in (self._by_load, self._by_room):
            names.update(dict.fromkeys(islice((name for name in ranking if name not in kept), NUM_PROBES)))
        return names

    def _cost(self, program: ProgramView, account: BackendAccount) -> tuple[float, int, int, str]:
        ledger = self._ledger
        in_flight = account.clock.num_in_flight
        load_s = ledger.model(account).mean_turn_s * (in_flight + account.num_bound) / 2
        seconds = ledger.prefill_s(program, account) + self._config.load_weight * load_s
        elsewhere = ledger.programs[program.program_id].last_backend != account.name
        return (seconds, int(elsewhere), in_flight, account.name)
