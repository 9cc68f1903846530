"""The program scheduler: events in, decisions out, nothing else.

Contract:
- `handle` is a pure function of the events so far: no clock, no I/O, no randomness. A bad event
  raises `BadEvent` and leaves the state as it was.
- A request ends in exactly one of Restore (with its grant), Reject, Expire (of its program), or its
  caller leaving (Withdrawn, ProgramEnded). A grant is a number used once; it is current until its turn ends, its
  backend dies (the caller then asks again) or its caller leaves. A late message about a grant that
  was taken back is ignored, one about an unknown grant is refused.
- An active program's request is admitted at once on its own backend, unless that one updates its
  weights or can't hold the prompt. `max_running` is a hint and blocks nothing.
- It always moves, whatever the policy: after any event, a backend with no turn in flight admits
  the first program of the queue that it can hold (`liveness.MAX_MOVED` backends an event, the others
  with the next); what no backend can hold is rejected.
- A program of which nothing was heard for `lease_s`, and that waits for nothing, is terminated at a
  tick: Expire, and ReleaseSandbox where one is owed.
- A program with a token that is older than `max_staleness` weight versions is never admitted again: it
  is terminated (Expire) when newer weights are announced while it asks, or when it asks next.
- PrepareSandbox is issued at the latest with a program's first Restore, and ahead of it as
  `sandboxes` says; where it was issued, ReleaseSandbox follows exactly once, at the program's end.

Restore for a program bound elsewhere moves it (request-level routers do). Policies choose, see
`policies.base`; this module owns the order of things within one event: the event itself, then the
policy's restores, its releases, the liveness rule, sandboxes ahead of need.
"""

from __future__ import annotations

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.checks import (
    check_announced,
    check_backend_up,
    check_end,
    check_progress,
    check_request,
    check_weights,
    holder,
    known_backend,
    known_program,
    rejection_of,
)
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import (
    Decision,
    Expire,
    ExpiryReason,
    Pause,
    ReleaseSandbox,
    Restore,
)
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    Event,
    ProgramAnnounced,
    ProgramEnded,
    SandboxFailed,
    SandboxReady,
    SandboxStopped,
    Tick,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnProgress,
    TurnRequested,
    TurnStarted,
    WeightsUpdated,
    WeightsUpdating,
    Withdrawn,
)
from thunder_rollout.core.liveness import moves
from thunder_rollout.core.policies import make_policy
from thunder_rollout.core.policies.base import Policy
from thunder_rollout.core.program import Program
from thunder_rollout.core.sandboxes import Sandboxes
from thunder_rollout.core.snapshot import SchedulerSnapshot
from thunder_rollout.core.state import State
from thunder_rollout.core.weights import WeightVersions
from thunder_rollout.errors import BadEvent


class Scheduler:
    """See the module. One per rollout; feed it from one place, in the order things happened."""

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        """`policy` replaces the one that `config.policy` names (for tests and experiments)."""
        self._config = config
        self._policy = policy if policy is not None else make_policy(config)
        self._state = State(self._policy.queue_key, max_wait_s=config.max_wait_s, on_change=self._policy.changed)
        self._versions = WeightVersions(config.max_staleness)
        self._sandboxes = Sandboxes(self._state, max_ahead=config.prepare_ahead)
        self._now = float("-inf")
        self._decisions: list[Decision] = []

    def handle(self, event: Event, now: float) -> list[Decision]:
        """What to do about `event`, at `now` seconds on the caller's monotonic clock.

        Raises `BadEvent` (state unchanged) for what can't be: time that runs backwards, counts
        below zero, an unknown program, grant or backend where one must be known.
        """
        if not now >= self._now:
            raise BadEvent(f"now={now!r}: earlier than the event before ({self._now!r}); use one monotonic clock")
        self._decisions = []
        self._policy.begin(now)
        self._apply(event, now)
        self._now = now
        self._policy.observe(event, now)
        self._follow_policy(now, tick=isinstance(event, Tick))
        for program, backend in moves(self._state, now):
            self._restore(program, backend, now)
        self._decisions += self._sandboxes.ahead(now, tick=isinstance(event, Tick))
        return self._decisions

    def snapshot(self) -> SchedulerSnapshot:
        return self._state.snapshot(self._policy.drift_tokens)

    def waiting_order(self) -> list[str]:
        """The programs of the queue in restore order, as of the last event."""
        return [program.program_id for program in self._state.waiting(self._now)]

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case ProgramAnnounced():
                check_announced(self._state, event)
                self._state.announce(Program(event.program), event.task_kind)
            case TurnRequested():
                self._on_turn_requested(event, now)
            case TurnStarted() | TurnProgress():
                self._on_turn_progress(event)
            case TurnEnded():
                self._on_turn_ended(event, now)
            case ToolStarted():
                known_program(self._state, event).start_tool(event.tool)
            case ToolEnded():
                known_program(self._state, event).end_tool()
            case ProgramEnded():
                if not self._forget_announced(event.program):
                    self._forget(known_program(self._state, event))
            case Withdrawn():
                self._on_withdrawn(event)
            case BackendUp():
                self._on_backend_up(event, now)
            case BackendDown():
                self._on_backend_down(event)
            case BackendStats():
                self._on_backend_stats(event)
            case WeightsUpdating() | WeightsUpdated():
                self._on_weights(event, now)
            case SandboxReady() | SandboxFailed() | SandboxStopped():
                self._decisions += self._sandboxes.heard(event, now)
            case Tick():
                self._expire_silent(now)
            case _:
                raise BadEvent(f"{type(event).__name__}: not an event of core.events")
        program = getattr(event, "program", None)
        if program in self._state.programs:
            self._state.hear(program, now)

    # Turns

    def _on_turn_requested(self, event: TurnRequested, now: float) -> None:
        check_request(event)
        program = self._state.programs.get(event.program)
        if program is not None and program.is_open(event.request):
            raise BadEvent(
                f"TurnRequested.request={event.request!r}: already open for program={event.program}; "
                "give each request a name of its own"
            )
        if program is not None and self._versions.is_stale(program.oldest_weights):
            self._expire(program, ExpiryReason.STALE, (*program.pending, event.request))
            return
        if (rejection := rejection_of(self._state, event)) is not None:
            self._decisions.append(rejection)
            return
        event = self._policy.accept(event)
        if program is None:
            program = self._state.add_program(event, now)
        self._state.request(program, event, now)
        self._place(program, event, now)

    def _on_turn_progress(self, event: TurnStarted | TurnProgress) -> None:
        if isinstance(event, TurnProgress):
            check_progress(event)
        program = holder(self._state, event)
        if program is None:
            return
        if isinstance(event, TurnProgress):
            self._state.progress(program, event.grant, event.output_tokens)
        else:
            program.start_turn(event.grant)

    def _on_turn_ended(self, event: TurnEnded, now: float) -> None:
        check_end(event)
        program = holder(self._state, event)
        if event.weight_version is not None and event.output_tokens != 0 and event.program in self._state.programs:
            # also where the grant was taken back: on an engine that leaves, turns may finish
            self._state.programs[event.program].note_weights(self._versions.number(event.weight_version))
        if program is not None:
            self._state.end_turn(program, event.grant, event.output_tokens, event.finish_reason, now)
            self._honour_mark(program)

    def _on_withdrawn(self, event: Withdrawn) -> None:
        program = self._state.programs.get(event.program)
        if program is None:
            if event.request is None:
                self._forget_announced(event.program)
            return
        if event.request is None:
            self._forget(program)
            return
        was_used = program.ran
        if event.request in program.pending:
            self._state.drop_request(program, event.request)
        elif (grant := program.grant_of(event.request)) is not None:
            was_used = program.turns[grant].started or program.num_turns_admitted > 1
            self._state.void_turn(program, grant)
            self._honour_mark(program)
        if not was_used and not program.has_open:
            self._forget(program)

    # Backends

    def _on_backend_up(self, event: BackendUp, now: float) -> None:
        check_backend_up(event, self._state.generations)
        before, old = self._state.max_capacity_tokens, self._state.backends.get(event.backend)
        if old is not None:
            self._take_down(old)
        self._state.add_backend(
            Backend(
                event.backend,
                generation=event.generation,
                capacity_tokens=event.capacity_tokens,
                max_running=event.max_running,
                updating=event.updating,
            )
        )
        self._reject_oversized(before)
        self._place_held(now)

    def _on_backend_down(self, event: BackendDown) -> None:
        before, backend = self._state.max_capacity_tokens, known_backend(self._state, event)
        if backend is not None:
            self._take_down(backend)
            self._reject_oversized(before)

    def _on_backend_stats(self, event: BackendStats) -> None:
        backend = known_backend(self._state, event)
        if backend is not None and event.used_tokens is not None:
            backend.used_tokens = event.used_tokens

    def _on_weights(self, event: WeightsUpdating | WeightsUpdated, now: float) -> None:
        check_weights(event, self._state.generations)
        updating = isinstance(event, WeightsUpdating)
        for name in event.backends:
            if name in self._state.backends:
                self._state.set_updating(self._state.backends[name], updating)
        if isinstance(event, WeightsUpdated):
            if event.version is not None and self._versions.announce(event.version):
                self._expire_stale()
            self._place_held(now)

    def _take_down(self, backend: Backend) -> None:
        """Its programs go back to the queue with their tokens; its grants are void."""
        for grant, program_id in list(backend.grants.items()):
            program = self._state.programs[program_id]
            self._state.void_turn(program, grant)
            self._honour_mark(program)
        for program in list(backend.programs.values()):
            elsewhere = next((turn.backend for turn in program.turns.values()), None)
            if elsewhere is None:
                self._pause(program)
            else:
                self._state.bind(program, self._state.backends[elsewhere])
        self._state.remove_backend(backend)

    # Carrying choices out

    def _follow_policy(self, now: float, *, tick: bool) -> None:
        for name in self._policy.reordered():
            self._state.reorder(name)
        self._follow_restores(now, tick=tick)
        released = False
        for program_id in self._policy.releases(self._state, now, tick=tick):
            self._release(self._state.programs[program_id])
            released = True
        if released:
            self._follow_restores(now, tick=False)

    def _follow_restores(self, now: float, *, tick: bool) -> None:
        for placement in self._policy.restores(self._state, now, tick=tick):
            program = self._state.programs[placement.program]
            self._restore(program, self._state.backends[placement.backend], now)

    def _place(self, program: Program, request: TurnRequested, now: float) -> None:
        name = self._policy.place(self._state, program, request, now)
        if program.backend is None:
            if name is not None and self._state.backends[name].fits(program.context_tokens):
                self._restore(program, self._state.backends[name], now)
        elif name is not None:
            if name != program.backend:
                self._state.bind(program, self._state.backends[name])
            self._admit(program, request, now)
        elif not self._state.backends[program.backend].fits(request.prompt_tokens):
            self._release(program)

    def _place_held(self, now: float) -> None:
        for program, pending in self._state.held_requests():
            if program.backend is not None:
                self._place(program, pending.event, now)

    def _restore(self, program: Program, backend: Backend, now: float) -> None:
        """Bind a waiting program and admit what it has pending."""
        assert not backend.updating
        assert backend.fits(program.context_tokens)
        self._state.bind(program, backend)
        for pending in list(program.pending.values()):
            self._admit(program, pending.event, now)
        if not program.turns:
            self._decisions.append(
                Restore(program=program.program_id, backend=backend.name, generation=backend.generation)
            )

    def _admit(self, program: Program, request: TurnRequested, now: float) -> None:
        assert program.backend is not None
        backend = self._state.backends[program.backend]
        assert not backend.updating
        assert backend.fits(request.prompt_tokens)
        self._decisions += self._sandboxes.granted(program, request, now)
        grant = self._state.admit(program, request.request)
        self._state.hear(program.program_id, now)
        self._decisions.append(
            Restore(
                program=program.program_id,
                backend=backend.name,
                generation=backend.generation,
                request=request.request,
                grant=grant,
            )
        )
        self._policy.granted(program, request, backend.name, grant)

    def _release(self, program: Program) -> None:
        """Pause now, or mark: paused when the last turn in flight ends."""
        if not program.turns:
            self._pause(program)
        elif not program.marked:
            self._state.mark(program)

    def _honour_mark(self, program: Program) -> None:
        if program.marked and not program.turns:
            self._pause(program)

    def _pause(self, program: Program) -> None:
        assert program.backend is not None
        self._decisions.append(Pause(program=program.program_id, backend=program.backend))
        self._state.pause(program)

    def _forget(self, program: Program) -> None:
        if program.sandbox_issued:
            self._decisions.append(ReleaseSandbox(program=program.program_id))
        self._state.forget(program)

    def _forget_announced(self, name: str) -> bool:
        program = self._state.take_announced(name)
        if program is not None and program.sandbox_issued:
            self._decisions.append(ReleaseSandbox(program=name))
        return program is not None

    def _expire_stale(self) -> None:
        """Those that ask; one that acts is told when it asks next."""
        for program in list(self._state.programs.values()):
            if program.pending and self._versions.is_stale(program.oldest_weights):
                self._expire(program, ExpiryReason.STALE, tuple(program.pending))

    def _expire_silent(self, now: float) -> None:
        """Terminate programs whose lease ran out; one that waits for an answer is not silent."""
        if self._config.lease_s is None:
            return
        for program in self._state.silent(now, self._config.lease_s):
            if program.pending:
                self._state.hear(program.program_id, now)
            else:
                self._expire(program, ExpiryReason.LEASE, ())

    def _expire(self, program: Program, reason: ExpiryReason, requests: tuple[str, ...]) -> None:
        self._decisions.append(Expire(program=program.program_id, reason=reason, requests=requests))
        self._forget(program)

    def _reject_oversized(self, before_tokens: int) -> None:
        """Where the largest backend is smaller than before, or the first, answer the requests that fit none."""
        if self._state.max_capacity_tokens >= before_tokens > 0:
            return
        for program in list(self._state.programs.values()):
            for pending in list(program.pending.values()):
                if (rejection := rejection_of(self._state, pending.event)) is not None:
                    self._decisions.append(rejection)
                    self._state.drop_request(program, pending.event.request)
            if not program.ran and not program.has_open:
                self._forget(program)
