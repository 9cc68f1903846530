"""The seam between the scheduler and its policies.

The scheduler owns the state and the liveness rules; a policy only chooses. It is asked

- `place`, once for each request at its arrival (again when backends open): which backend serves
  it, or None. None lets the request wait: in the queue where its program is bound to no backend,
  at its own backend where it is. A request-level router answers every call with a backend; a
  program scheduler may leave programs waiting and place them by
- `restores` and `releases`, after every event (`tick` tells whether it was a `Tick`): which
  waiting programs to bind, then which bound ones to give up. A released program is paused at
  once, or marked and paused when its last turn in flight ends. Each choice is carried out before
  the next is asked for, so a generator sees the state change under it. Where something was
  released, `restores` is asked once more, not as a tick.
- `queue_key`, to order the queue; it may depend on the program alone, or change for those that
  `reordered` names.

and told `begin`, `accept`, `changed`, `granted` and `observe`, from which it may keep an account of
its own. It never changes what it is shown. Every choice must name an open backend that `fits` the
program's context.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thunder_rollout.core.events import Event, TurnRequested
from thunder_rollout.core.program import Pending, Phase, Status, Turn
from thunder_rollout.core.queue import SortKey


class ProgramView(Protocol):
    @property
    def program_id(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def task_kind(self) -> str | None: ...
    @property
    def arrived_s(self) -> float: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def status(self) -> Status: ...
    @property
    def backend(self) -> str | None: ...
    @property
    def marked(self) -> bool: ...
    @property
    def ran(self) -> bool: ...
    @property
    def acting_since_s(self) -> float | None: ...
    @property
    def tool(self) -> str | None: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def has_open(self) -> bool: ...
    @property
    def turns(self) -> Mapping[int, Turn]: ...
    @property
    def pending(self) -> Mapping[str, Pending]: ...


class BackendView(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def capacity_tokens(self) -> int: ...
    @property
    def max_running(self) -> int: ...
    @property
    def updating(self) -> bool: ...
    @property
    def programs(self) -> Mapping[str, ProgramView]: ...
    @property
    def reasoning_tokens(self) -> int: ...
    @property
    def acting_tokens(self) -> int: ...
    @property
    def marked_tokens(self) -> int: ...
    @property
    def bound_tokens(self) -> int: ...
    @property
    def num_bound(self) -> int: ...
    @property
    def num_marked(self) -> int: ...
    @property
    def num_in_flight(self) -> int: ...

    def fits(self, context_tokens: int) -> bool:
        """Whether the empty pool could hold the context and one token more."""


class View(Protocol):
    """The state as policies see it."""

    @property
    def backends(self) -> Mapping[str, BackendView]: ...
    @property
    def num_bound(self) -> int:
        """Programs bound to any backend."""

    @property
    def num_waiting(self) -> int:
        """Programs in the queue, one whose request is being placed included."""

    @property
    def num_waiting_pending(self) -> int:
        """Those of them with a request pending."""

    def open_backends(self) -> Collection[BackendView]:
        """Up and not updating their weights."""

    def waiting(self, now: float) -> Iterator[ProgramView]:
        """The queue: overdue programs oldest first, then by `queue_key`, pending ones first."""

    def overdue(self, now: float) -> Sequence[ProgramView]:
        """Programs whose request waits longer than `max_wait_s`, oldest first."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Bind a waiting program to a backend and admit its pending requests there."""

    program: str
    backend: str


class Policy(Protocol):
    def begin(self, now: float) -> None:
        """An event is about to be looked at; it may yet be refused."""

    def accept(self, request: TurnRequested) -> TurnRequested:
        """The request as the state shall keep it: a policy that took its hashes in may drop them."""

    def changed(self, program: ProgramView) -> None:
        """Its context, phase, place or turns changed (status TERMINATED: it is forgotten)."""

    def queue_key(self, program: ProgramView) -> SortKey:
        """Smallest first; of one length for all programs. Ties go to the longest waiting."""

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None: ...

    def restores(self, view: View, now: float, *, tick: bool) -> Iterable[Placement]: ...

    def releases(self, view: View, now: float, *, tick: bool) -> Iterable[str]: ...

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None: ...

    def observe(self, event: Event, now: float) -> None:
        """Every accepted event, after the state followed it and before `restores`."""

    def reordered(self) -> Collection[str]:
        """Programs whose `queue_key` changed with the last event although they did not."""

    def drift_tokens(self, backend: str) -> int | None:
        """Tokens that the policy was wrong about when the backend last told what it holds; None where the
        policy or the backend doesn't tell."""


class PolicyBase:
    """First come, first served (programs that ran before go first); never restores or releases."""

    def queue_key(self, program: ProgramView) -> SortKey:
        return (float(not program.ran),)

    def begin(self, now: float) -> None:
        return None

    def accept(self, request: TurnRequested) -> TurnRequested:
        return request

    def changed(self, program: ProgramView) -> None:
        return None

    def restores(self, view: View, now: float, *, tick: bool) -> Iterable[Placement]:
        return ()

    def releases(self, view: View, now: float, *, tick: bool) -> Iterable[str]:
        return ()

    def reordered(self) -> Collection[str]:
        return ()

    def drift_tokens(self, backend: str) -> int | None:
        return None

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        return None

    def observe(self, event: Event, now: float) -> None:
        return None


def home(view: View, program: ProgramView, context_tokens: int) -> BackendView | None:
    """The program's own backend, if it has one that is open and can hold the context."""
    backend = view.backends[program.backend] if program.backend is not None else None
    if backend is None or backend.updating or not backend.fits(context_tokens):
        return None
    return backend


class LeastInFlight:
    """Chooses the backend with the fewest turns in flight (then programs, then by name), counting
    the choices it made itself, so that one batch of placements spreads."""

    def __init__(self, backends: Iterable[BackendView]) -> None:
        self._backends = list(backends)
        self._extra: dict[str, int] = {}

    def choose(self, context_tokens: int, num_turns: int = 1) -> str | None:
        """None where no backend can hold the context."""
        fitting = [backend for backend in self._backends if backend.fits(context_tokens)]
        if not fitting:
            return None
        name = min(fitting, key=self._load).name
        self._extra[name] = self._extra.get(name, 0) + num_turns
        return name

    def _load(self, backend: BackendView) -> tuple[int, int, str]:
        extra = self._extra.get(backend.name, 0)
        return (backend.num_in_flight + extra, backend.num_bound + extra, backend.name)


def spread_waiting(view: View, now: float, *, limit: int | None = None) -> Sequence[Placement]:
    """Place waiting programs with a request, in order, each where the fewest turns are in flight;
    at most `limit` of them."""
    backends = view.open_backends()
    if not backends or not view.num_waiting_pending or limit == 0:
        return ()
    chooser = LeastInFlight(backends)
    placements: list[Placement] = []
    for program in view.waiting(now):
        if not program.pending or len(placements) == limit:
            break
        name = chooser.choose(program.context_tokens, len(program.pending))
        if name is not None:
            placements.append(Placement(program.program_id, name))
    return placements
