"""`ttl`: a program's KV is pinned for a time-to-live while it acts; programs are served first come,
first served. After Continuum (arXiv 2511.02230), in our terms.

- the time-to-live of a tool is a quantile of the times its last calls took, within `max_ttl_s`;
  a tool never seen has `default_ttl_s`;
- a program that acts beyond it is paused as soon as another waits for a place;
- the queue is in order of programs' arrival, and nobody passes its head: the head is placed where
  it ran last if there is room, else where the fewest tokens are bound;
- where demand passes the capacity, the program that arrived last gives way.

Demand is counted as `thunder` does: context tokens, plus `headroom_tokens` for every bound program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush

from thunder_rollout.core.config import TtlConfig
from thunder_rollout.core.events import Event, ToolStarted, TurnRequested
from thunder_rollout.core.policies.base import BackendView, Placement, PolicyBase, ProgramView, View, home
from thunder_rollout.core.program import Phase, Status
from thunder_rollout.core.queue import SortKey

MAX_CALLS = 64  # times remembered for each tool


class TtlPolicy(PolicyBase):
    def __init__(self, config: TtlConfig) -> None:
        self._config = config
        self._now = 0.0
        self._calls_s: dict[str | None, deque[float]] = {}
        self._acting: dict[str, tuple[float, str | None]] = {}  # program -> since when, with which tool
        self._pins: list[tuple[float, float, str]] = []  # heap of (until, since, bound program)
        self._last_backend: dict[str, str] = {}
        self._touched: dict[str, None] = {}

    def queue_key(self, program: ProgramView) -> SortKey:
        return (program.arrived_s,)

    def begin(self, now: float) -> None:
        self._now = now

    def changed(self, program: ProgramView) -> None:
        """Learn how long a tool took when its program is back."""
        name, since_s = program.program_id, program.acting_since_s
        if program.phase is Phase.ACTING and since_s is not None:
            if name not in self._acting:
                self._pin(name, since_s, program.tool)
        elif (acted := self._acting.pop(name, None)) is not None:
            calls_s = self._calls_s.setdefault(acted[1], deque(maxlen=MAX_CALLS))
            calls_s.append(self._now - acted[0])
        if program.status is Status.TERMINATED:
            self._last_backend.pop(name, None)
        if program.backend is not None:
            self._touched[program.backend] = None

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        self._last_backend[program.program_id] = backend

    def observe(self, event: Event, now: float) -> None:
        if isinstance(event, ToolStarted) and event.program in self._acting:
            self._pin(event.program, self._acting[event.program][0], event.tool)

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        own = home(view, program, request.prompt_tokens)
        return own.name if own is not None else None

    def restores(self, view: View, now: float, *, tick: bool) -> Iterator[Placement]:
        while view.num_waiting_pending:
            head = next(view.waiting(now))
            backend = self._room_for(view, head)
            if backend is None:
                return
            yield Placement(head.program_id, backend)

    def releases(self, view: View, now: float, *, tick: bool) -> Iterator[str]:
        touched, self._touched = self._touched, {}
        for name in touched:
            backend = view.backends.get(name)
            if backend is not None and self._demand(backend) > backend.capacity_tokens:
                yield from self._newest(backend, self._demand(backend) - backend.capacity_tokens)
        while view.num_waiting_pending and self._pins and self._pins[0][0] < now:
            _, since_s, name = heappop(self._pins)
            acted = self._acting.get(name)
            if acted is None or acted[0] != since_s or not self._is_bound(view, name):
                continue
            if since_s + self.ttl_s(acted[1]) < now:
                yield name
            else:
                self._pin(name, *acted)

    def ttl_s(self, tool: str | None) -> float:
        calls_s = sorted(self._calls_s.get(tool, ()))
        if not calls_s:
            return self._config.default_ttl_s
        return min(self._config.max_ttl_s, calls_s[int(self._config.ttl_quantile * (len(calls_s) - 1))])

    def _pin(self, name: str, since_s: float, tool: str | None) -> None:
        self._acting[name] = (since_s, tool)
        heappush(self._pins, (since_s + self.ttl_s(tool), since_s, name))

    def _is_bound(self, view: View, name: str) -> bool:
        backend = view.backends.get(self._last_backend.get(name, ""))
        return backend is not None and name in backend.programs

    def _demand(self, backend: BackendView) -> int:
        """What is left when the marked programs are gone."""
        num_left = backend.num_bound - backend.num_marked
        return backend.bound_tokens - backend.marked_tokens + num_left * self._config.headroom_tokens

    def _newest(self, backend: BackendView, need_tokens: int) -> list[str]:
        names: list[str] = []
        left = [program for program in backend.programs.values() if not program.marked]
        for program in sorted(left, key=lambda program: (-program.arrived_s, program.program_id))[:-1]:
            if need_tokens <= 0:
                break
            need_tokens -= program.context_tokens + self._config.headroom_tokens
            names.append(program.program_id)
        return names

    def _room_for(self, view: View, program: ProgramView) -> str | None:
        headroom = self._config.headroom_tokens
        rooms = [
            (backend.name != self._last_backend.get(program.program_id), backend.bound_tokens, backend.name)
            for backend in view.open_backends()
            if backend.fits(program.context_tokens)
            and backend.bound_tokens + program.context_tokens + (backend.num_bound + 1) * headroom
            <= backend.capacity_tokens
        ]
        return min(rooms)[-1] if rooms else None
