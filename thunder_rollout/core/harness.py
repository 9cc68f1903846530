"""A scheduler with a hand on its clock: the fake shell of tests and of small experiments.

`Harness` gives grants back for the caller, keeps what it sent and what came of it, and checks every
invariant of the core after each event; `replay` runs recorded events through a new scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.decisions import Decision, Expire, PrepareSandbox, Reject, ReleaseSandbox, Restore
from thunder_rollout.core.events import (
    BackendDown,
    BackendUp,
    Event,
    FinishReason,
    ProgramEnded,
    SandboxFailed,
    SandboxStopped,
    Tick,
    TurnEnded,
    TurnRequested,
    Withdrawn,
)
from thunder_rollout.core.program import Phase, Program, SandboxNeed, Status
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.core.state import State


class Harness:
    """One scheduler, its clock (`now`), the turns in flight (`grants`: grant -> program, request), the
    requests that wait for an answer (`waiting`: request -> program) and the programs that are owed a
    ReleaseSandbox (`owed`)."""

    def __init__(self, config: SchedulerConfig, **capacity_tokens: int) -> None:
        """`capacity_tokens` names the backends that are up from the start."""
        self.config = config
        self.scheduler = Scheduler(config)
        self.now = 0.0
        self.log: list[tuple[Event, float]] = []
        self.decisions: list[list[Decision]] = []
        self.grants: dict[int, tuple[str, str]] = {}
        self.waiting: dict[str, str] = {}
        self.owed: set[str] = set()
        self._prepared: set[str] = set()
        self._used: set[str] = set()  # those of them that were granted a turn since
        self._num_requests = 0
        for name, tokens in capacity_tokens.items():
            self.up(name, tokens)

    def send(self, event: Event) -> list[Decision]:
        """Raises what `handle` raises; an event that it refuses is not in the log."""
        decisions = self.scheduler.handle(event, self.now)
        self.log.append((event, self.now))
        self.decisions.append(decisions)
        self._follow(event, decisions)
        check(self.scheduler._state, self.now)
        return decisions

    def up(self, backend: str, capacity_tokens: int, *, generation: int = 1) -> list[Decision]:
        return self.send(
            BackendUp(backend=backend, generation=generation, capacity_tokens=capacity_tokens, max_running=8)
        )

    def down(self, backend: str, *, generation: int = 1) -> list[Decision]:
        return self.send(BackendDown(backend=backend, generation=generation))

    def ask(
        self,
        program: str,
        prompt_tokens: int,
        *,
        request: str | None = None,
        block_hashes: tuple[int, ...] | None = None,
        sandbox: bool = False,
        group: str | None = None,
        task_kind: str | None = None,
        age_s: float = 0.0,
    ) -> list[Decision]:
        self._num_requests += 1
        return self.send(
            TurnRequested(
                program=program,
                request=request or f"r{self._num_requests}",
                prompt_tokens=prompt_tokens,
                block_hashes=block_hashes,
                sandbox=sandbox,
                task_kind=task_kind,
                group=group,
                age_s=age_s,
            )
        )

    def end(
        self, program: str, output_tokens: int | None = None, *, finish_reason: FinishReason = FinishReason.STOP
    ) -> list[Decision]:
        """End the program's oldest turn in flight."""
        grant = next(grant for grant, (holder, _) in self.grants.items() if holder == program)
        return self.send(
            TurnEnded(program=program, grant=grant, output_tokens=output_tokens, finish_reason=finish_reason)
        )

    def tick(self, after_s: float = 0.0) -> list[Decision]:
        self.now += after_s
        return self.send(Tick())

    def _follow(self, event: Event, decisions: list[Decision]) -> None:
        match event:
            case TurnRequested():
                self.waiting[event.request] = event.program
            case TurnEnded():
                self.grants.pop(event.grant, None)
            case ProgramEnded() | Withdrawn(request=None):
                self._drop(event.program, None)
            case Withdrawn():
                self._drop(event.program, event.request)
            case SandboxFailed():
                self._prepared.discard(event.program)
            case SandboxStopped() if event.program in self._used:
                self._prepared.discard(event.program)
            case BackendUp() | BackendDown():
                void = self.scheduler._state.void_grants
                self.grants = {grant: turn for grant, turn in self.grants.items() if grant not in void}
            case _:
                pass
        for decision in decisions:
            match decision:
                case Restore(request=str() as request, grant=int() as grant):
                    self.grants[grant] = (decision.program, request)
                    del self.waiting[request]
                    self._used.add(decision.program)
                case Reject():
                    del self.waiting[decision.request]
                case Expire():
                    for request in decision.requests:
                        del self.waiting[request]
                    assert decision.program not in self.waiting.values(), "who expires hears of every request"
                    self._drop(decision.program, None)
                case PrepareSandbox():
                    assert decision.program not in self._prepared, "a sandbox is prepared once"
                    self._prepared.add(decision.program)
                    if decision.program not in (holder for holder, _ in self.grants.values()):
                        self._used.discard(decision.program)
                    self.owed.add(decision.program)
                case ReleaseSandbox():
                    self.owed.remove(decision.program)
                    self._prepared.discard(decision.program)
                case _:
                    pass

    def _drop(self, program: str, request: str | None) -> None:
        def keeps(holder: str, name: str) -> bool:
            return holder != program or (request is not None and name != request)

        self.grants = {grant: turn for grant, turn in self.grants.items() if keeps(*turn)}
        self.waiting = {name: holder for name, holder in self.waiting.items() if keeps(holder, name)}


def replay(config: SchedulerConfig, log: Iterable[tuple[Event, float]]) -> list[list[Decision]]:
    """The decisions of a new scheduler on recorded events."""
    scheduler = Scheduler(config)
    return [scheduler.handle(event, now) for event, now in log]


def check(state: State, now: float) -> None:
    """Assert every invariant that holds between two events, whatever the policy."""
    for program in state.programs.values():
        _check_place(state, program)
    for backend in state.backends.values():
        programs = backend.programs.values()
        acting = [program.context_tokens for program in programs if program.phase is Phase.ACTING]
        marked = [program.context_tokens for program in programs if program.marked]
        assert backend.bound_tokens == sum(program.context_tokens for program in programs)
        assert (backend.acting_tokens, backend.num_acting) == (sum(acting), len(acting))
        assert (backend.marked_tokens, backend.num_marked) == (sum(marked), len(marked))
        for grant, program_id in backend.grants.items():
            assert state.programs[program_id].turns[grant].backend == backend.name
    assert state.num_bound == sum(backend.num_bound for backend in state.backends.values())
    assert len(state.queue) + state.num_bound == len(state.programs)
    in_places = sum(backend.bound_tokens for backend in state.backends.values()) + state.snapshot().waiting_tokens
    assert in_places == sum(program.context_tokens for program in state.programs.values()), "tokens are conserved"
    assert sum(len(b.grants) for b in state.backends.values()) == sum(len(p.turns) for p in state.programs.values())
    _check_liveness(state, now)
    _check_sandboxes(state, now)


def _check_place(state: State, program: Program) -> None:
    places = [name for name, backend in state.backends.items() if program.program_id in backend.programs]
    if program.backend is None:
        assert program.status is Status.PAUSED
        assert program.program_id in state.queue
        assert places == []
        assert not program.turns
    else:
        assert program.status is Status.ACTIVE
        assert program.program_id not in state.queue
        assert places == [program.backend]
    assert not program.marked or program.turns, "a mark ends with the last turn"
    assert program.ran or program.has_open, "a program that left no trace is forgotten"


def _check_sandboxes(state: State, now: float) -> None:
    waiting = list(state.waiting(now))
    unready = [program for program in waiting if program.awaits_sandbox]
    assert list(state.unready.ordered(now)) == unready, "in restore order, like the queue"
    assert not set(state.announced) & set(state.programs)
    coming = [*waiting, *state.announced.values()]
    assert state.prepared == {program.program_id for program in coming if program.sandbox is SandboxNeed.PREPARED}
    for program in state.programs.values():
        assert program.backend is None or not program.turns or program.sandbox is not SandboxNeed.PREPARED
        assert program.sandbox_issued or program.sandbox in (SandboxNeed.NONE, SandboxNeed.WANTED)


def _check_liveness(state: State, now: float) -> None:
    waiting = [program for program in state.waiting(now) if program.pending]
    for backend in state.open_backends():
        if not backend.grants:
            assert not any(backend.fits(program.context_tokens) for program in waiting), "an idle backend admits"
    for program, pending in state.held_requests():
        home = state.backends[program.backend or ""]
        assert home.updating or not home.fits(pending.event.prompt_tokens), "held without a reason"
    if state.backends:
        largest = max(backend.capacity_tokens for backend in state.backends.values())
        for program in state.programs.values():
            for pending in program.pending.values():
                assert pending.event.prompt_tokens < largest, "what fits nowhere is rejected"
