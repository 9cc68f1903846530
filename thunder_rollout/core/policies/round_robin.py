"""`round_robin`: each request goes to the next backend by name, whatever its program."""

from __future__ import annotations

from collections.abc import Sequence

from thunder_rollout.core.events import TurnRequested
from thunder_rollout.core.policies.base import Placement, PolicyBase, ProgramView, View


class RoundRobinPolicy(PolicyBase):
    def __init__(self) -> None:
        self._last = ""  # the backend that got the last turn

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        return _next_after(self._last, view, request.prompt_tokens)

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        if not view.num_waiting_pending or not view.open_backends():
            return ()
        placements: list[Placement] = []
        last = self._last
        for program in view.waiting(now):
            if not program.pending:
                break
            name = _next_after(last, view, program.context_tokens)
            if name is not None:
                placements.append(Placement(program.program_id, name))
                last = name
        return placements

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        self._last = backend


def _next_after(last: str, view: View, context_tokens: int) -> str | None:
    names = [backend.name for backend in view.open_backends() if backend.fits(context_tokens)]
    later = [name for name in names if name > last]
    return min(later or names, default=None)
