"""The scheduler's whole state and every change to it.

Invariants: a program is in exactly one place, the queue or one backend; a backend's sums and the
queue's order follow each change at once; a grant is current (its program has the turn), void (we
took it back: a late message about it is expected) or unknown. Policies see it as a `View`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import takewhile

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.events import FinishReason, TurnRequested
from thunder_rollout.core.program import Pending, Program, SandboxNeed, Status
from thunder_rollout.core.queue import Kind, SortKey, WaitingQueue
from thunder_rollout.core.snapshot import BackendSnapshot, SchedulerSnapshot

MAX_VOID_GRANTS = 16_384  # a message about a grant voided longer ago is refused as unknown


class State:
    """See the module. `backends` are those up; a program of the queue has no backend."""

    def __init__(
        self,
        queue_key: Callable[[Program], SortKey],
        *,
        max_wait_s: float,
        on_change: Callable[[Program], None] = lambda program: None,
    ) -> None:
        """`on_change` hears of every program that changed, after its place and the sums did."""
        self.programs: dict[str, Program] = {}
        self.backends: dict[str, Backend] = {}
        self.generations: dict[str, int] = {}  # the newest of each backend that ever was up
        self.queue = WaitingQueue(queue_key, max_wait_s=max_wait_s)
        self.unready = WaitingQueue(queue_key, max_wait_s=max_wait_s)  # those of it that await a sandbox
        self.unready_changed = False  # since whoever prepares them last looked
        self.announced: dict[str, Program] = {}  # none of `programs` yet, in the order of their announcement
        self.prepared: set[str] = set()  # programs of the queue and announced ones whose sandbox is prepared
        self.void_grants: dict[int, str] = {}  # grant -> program, oldest first
        self.num_bound = 0
        self.max_capacity_tokens = 0  # of the largest backend that is up
        self.heard_s: OrderedDict[str, float] = OrderedDict()  # when each program was last heard of, oldest first
        self._on_change = on_change
        self._idle: dict[str, Backend] = {}  # no turn in flight and not updating
        self._held: dict[str, Program] = {}  # bound, with requests that were not admitted
        self._last_grant = 0
        self._last_seq = 0

    # What policies read (policies.base.View)

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_waiting_pending(self) -> int:
        return self.queue.num_pending

    def open_backends(self) -> list[Backend]:
        """Those that may admit turns, in order of arrival."""
        return [backend for backend in self.backends.values() if not backend.updating]

    def waiting(self, now: float) -> Iterator[Program]:
        return self.queue.ordered(now)

    def overdue(self, now: float) -> list[Program]:
        return list(self.queue.overdue(now))

    # What the scheduler asks

    def idle_backends(self) -> list[Backend]:
        """No turn in flight, not updating; the emptiest first."""
        return sorted(self._idle.values(), key=lambda backend: (backend.bound_tokens, backend.name))

    def has_idle_backend(self) -> bool:
        return bool(self._idle)

    def held_requests(self) -> list[tuple[Program, Pending]]:
        """Requests of bound programs that were not admitted, in order of arrival."""
        held = [(program, pending) for program in self._held.values() for pending in program.pending.values()]
        return sorted(held, key=lambda item: item[1].seq)

    def snapshot(self, drift_tokens: Callable[[str], int | None] = lambda backend: None) -> SchedulerSnapshot:
        paused = [program for program in self.programs.values() if program.status is Status.PAUSED]
        return SchedulerSnapshot(
            backends=tuple(_snapshot_of(self.backends[name], drift_tokens(name)) for name in sorted(self.backends)),
            num_programs=len(self.programs),
            num_waiting_returning=self.queue.count(Kind.RETURNING),
            num_waiting_new=self.queue.count(Kind.NEW),
            num_waiting_acting=self.queue.count(Kind.ACTING),
            waiting_tokens=sum(program.context_tokens for program in paused),
            pending_tokens=sum(program.context_tokens for program in paused if program.pending),
        )

    # Backends

    def add_backend(self, backend: Backend) -> None:
        self.backends[backend.name] = backend
        self.generations[backend.name] = backend.generation
        self._measure()
        self._refresh_idle(backend)

    def remove_backend(self, backend: Backend) -> None:
        assert not backend.programs
        assert not backend.grants
        del self.backends[backend.name]
        self._idle.pop(backend.name, None)
        self._measure()

    def set_updating(self, backend: Backend, updating: bool) -> None:
        backend.updating = updating
        self._refresh_idle(backend)

    # Programs

    def add_program(self, event: TurnRequested, now: float) -> Program:
        """The program of a first request."""
        program = self.take_announced(event.program) or Program(event.program)
        program.arrive(event, now)
        self.programs[program.program_id] = program
        return program

    def hear(self, program_id: str, now: float) -> None:
        """Its lease runs from now."""
        self.heard_s[program_id] = now
        self.heard_s.move_to_end(program_id)

    def silent(self, now: float, lease_s: float) -> list[Program]:
        """Programs not heard of for `lease_s`, oldest first."""
        names = takewhile(lambda name: now - self.heard_s[name] >= lease_s, self.heard_s)
        return [self.programs[name] for name in names]

    def request(self, program: Program, event: TurnRequested, now: float) -> None:
        self._last_seq += 1
        program.request(Pending(event=event, since_s=now, seq=self._last_seq))
        self._refresh(program)

    def drop_request(self, program: Program, request: str) -> None:
        program.drop_request(request)
        self._refresh(program)

    def bind(self, program: Program, backend: Backend) -> None:
        """From the queue or from another backend."""
        if program.backend is None:
            self._dequeue(program)
            program.restore(backend.name)
            self.num_bound += 1
        else:
            self.backends[program.backend].unbind(program)
            program.move(backend.name)
        backend.bind(program)
        self._tell(program)

    def reorder(self, program_id: str) -> None:
        """Its key changed: if it waits, it moves to its place."""
        program = self.programs.get(program_id)
        if program is not None and program.backend is None:
            self._enqueue(program)

    def pause(self, program: Program) -> None:
        assert program.backend is not None
        backend = self.backends[program.backend]
        program.pause()
        backend.unbind(program)
        self.num_bound -= 1
        self._enqueue(program)
        self._tell(program)

    def mark(self, program: Program) -> None:
        program.mark()
        self._refresh(program)

    def forget(self, program: Program) -> None:
        for grant, turn in list(program.turns.items()):
            self._void(program, grant, turn.backend)
        if program.backend is None:
            self._dequeue(program)
        else:
            self.backends[program.backend].unbind(program)
            self.num_bound -= 1
        program.terminate()
        del self.programs[program.program_id]
        self.heard_s.pop(program.program_id, None)
        self._tell(program)

    # Sandboxes

    def announce(self, program: Program, task_kind: str | None) -> None:
        program.announce(task_kind)
        self.announced[program.program_id] = program
        self.unready_changed = True

    def take_announced(self, program_id: str) -> Program | None:
        """If it was: it comes now, or never will."""
        program = self.announced.pop(program_id, None)
        if program is not None:
            self.prepared.discard(program_id)
            self.unready_changed = True
        return program

    def prepare_sandbox(self, program: Program, now: float) -> None:
        program.sandbox_prepared(now)
        if program.backend is None:
            self.prepared.add(program.program_id)

    def sandbox_failed(self, program: Program) -> None:
        program.sandbox_failed()
        self.prepared.discard(program.program_id)
        if program.program_id in self.programs:
            self._refresh(program)

    def sandbox_stopped(self, program: Program) -> None:
        if program.program_id in self.programs:
            program.sandbox_stopped()
            self._refresh(program)

    # Turns

    def admit(self, program: Program, request: str) -> int:
        """The program's pending request becomes a turn on its backend; returns the grant."""
        assert program.backend is not None
        backend = self.backends[program.backend]
        self._last_grant += 1
        program.admit(request, self._last_grant)
        backend.grants[self._last_grant] = program.program_id
        self._refresh(program)
        self._refresh_idle(backend)
        return self._last_grant

    def progress(self, program: Program, grant: int, output_tokens: int) -> None:
        program.progress(grant, output_tokens)
        self._refresh(program)

    def end_turn(
        self, program: Program, grant: int, output_tokens: int | None, finish_reason: FinishReason, now: float
    ) -> None:
        backend = self.backends[program.turns[grant].backend]
        program.end_turn(grant, output_tokens, finish_reason, now)
        del backend.grants[grant]
        self._refresh(program)
        self._refresh_idle(backend)

    def void_turn(self, program: Program, grant: int) -> None:
        """Take a grant back; late messages about it will be ignored."""
        self._void(program, grant, program.turns[grant].backend)
        program.void_turn(grant)
        self._refresh(program)

    def _void(self, program: Program, grant: int, backend_name: str) -> None:
        backend = self.backends[backend_name]
        del backend.grants[grant]
        self._refresh_idle(backend)
        self.void_grants[grant] = program.program_id
        if len(self.void_grants) > MAX_VOID_GRANTS:
            del self.void_grants[next(iter(self.void_grants))]

    def _measure(self) -> None:
        self.max_capacity_tokens = max((backend.capacity_tokens for backend in self.backends.values()), default=0)

    def _enqueue(self, program: Program) -> None:
        arrival = self.queue.put(program)
        if program.awaits_sandbox:
            self.unready.put(program, arrival)
            self.unready_changed = True
        else:
            self._no_longer_unready(program)
        if program.sandbox is SandboxNeed.PREPARED:
            self.prepared.add(program.program_id)
        else:
            self.prepared.discard(program.program_id)

    def _dequeue(self, program: Program) -> None:
        self.queue.remove(program)
        self._no_longer_unready(program)
        self.prepared.discard(program.program_id)

    def _no_longer_unready(self, program: Program) -> None:
        if program.program_id in self.unready:
            self.unready.remove(program)
            self.unready_changed = True

    def _refresh(self, program: Program) -> None:
        if program.backend is None:
            self._enqueue(program)
        else:
            self.backends[program.backend].refresh(program)
        self._tell(program)

    def _tell(self, program: Program) -> None:
        if program.backend is not None and program.pending:
            self._held[program.program_id] = program
        else:
            self._held.pop(program.program_id, None)
        self._on_change(program)

    def _refresh_idle(self, backend: Backend) -> None:
        if backend.updating or backend.grants:
            self._idle.pop(backend.name, None)
        else:
            self._idle[backend.name] = backend


def _snapshot_of(backend: Backend, drift_tokens: int | None) -> BackendSnapshot:
    return BackendSnapshot(
        backend=backend.name,
        generation=backend.generation,
        capacity_tokens=backend.capacity_tokens,
        used_tokens=backend.used_tokens,
        updating=backend.updating,
        demand_tokens=backend.bound_tokens,
        marked_tokens=backend.marked_tokens,
        num_reasoning=backend.num_reasoning,
        num_acting=backend.num_acting,
        num_marked=backend.num_marked,
        num_in_flight=backend.num_in_flight,
        drift_tokens=drift_tokens,
    )
