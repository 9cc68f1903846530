"""Which program's sandbox is asked for when: at the latest with the grant that needs it, ahead of it as far
down the queue as `preparation` says.

Each method returns the decisions it comes to. A failed sandbox is asked for anew with its program's next
request, one that was stopped while its program waits before the next grant.
"""

from __future__ import annotations

from itertools import chain, islice

from thunder_rollout.core.decisions import PrepareSandbox
from thunder_rollout.core.events import SandboxFailed, SandboxReady, SandboxStopped, TurnRequested
from thunder_rollout.core.preparation import Kind, Preparation
from thunder_rollout.core.program import Program, SandboxNeed
from thunder_rollout.core.state import State


class Sandboxes:
    def __init__(self, state: State, *, max_ahead: int) -> None:
        """At most `max_ahead` programs that wait or are announced have one prepared."""
        self._state = state
        self._max_ahead = max_ahead
        self._preparation = Preparation(max_ahead)

    def heard(self, event: SandboxReady | SandboxFailed | SandboxStopped, now: float) -> list[PrepareSandbox]:
        program = self._state.programs.get(event.program) or self._state.announced.get(event.program)
        if program is None:  # an end that crossed this message on its way
            return []
        match event:
            case SandboxReady():
                program.sandbox_ready(now)
                self._learn(program)
            case SandboxFailed():
                self._state.sandbox_failed(program)
            case SandboxStopped():
                self._state.sandbox_stopped(program)
                if program.turns:  # granted meanwhile
                    return self._prepare(program, now, by_s=now)
        return []

    def granted(self, program: Program, request: TurnRequested, now: float) -> list[PrepareSandbox]:
        """Before the program's pending `request` is admitted."""
        was_foreseen = program.announced or program.pending[request.request].since_s < now
        awaited = program.awaits_sandbox
        decisions = self._prepare(program, now, by_s=now)
        if awaited and was_foreseen:
            is_late = program.sandbox_lead_s is None
            program.sandbox_grant = self._preparation.note_grant(_kind(program), now, is_late=is_late)
            self._learn(program)
        return decisions

    def ahead(self, now: float, *, tick: bool) -> list[PrepareSandbox]:
        """A tick looks again although nothing changed: time makes programs overdue."""
        if not tick and not self._state.unready_changed:
            return []
        self._state.unready_changed = False
        decisions: list[PrepareSandbox] = []
        coming = chain(self._state.unready.ordered(now), self._state.announced.values())
        for place, program in enumerate(islice(coming, self._max_ahead), start=1):
            if len(self._state.prepared) >= self._max_ahead:
                break
            if program.sandbox is SandboxNeed.WANTED and place <= self._preparation.depth(_kind(program)):
                decisions += self._prepare(program, now, by_s=now + self._preparation.expected_s(place))
        return decisions

    def _learn(self, program: Program) -> None:
        """Once a start's lead time and its program's grant are known, whichever comes first."""
        if program.sandbox_lead_s is not None and program.sandbox_grant is not None:
            self._preparation.note_start(_kind(program), program.sandbox_lead_s, program.sandbox_grant)
            program.sandbox_grant = None

    def _prepare(self, program: Program, now: float, *, by_s: float) -> list[PrepareSandbox]:
        if program.sandbox is not SandboxNeed.WANTED:
            return []
        self._state.prepare_sandbox(program, now)
        return [PrepareSandbox(program=program.program_id, by_s=by_s)]


def _kind(program: Program) -> Kind:
    return program.task_kind, program.sandbox_was_stopped
