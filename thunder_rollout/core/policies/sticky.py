"""`sticky`: a program's first request goes to the backend with the fewest turns in flight, every
later one to the same backend. What verl does by default; nothing ever waits for room."""

from __future__ import annotations

from collections.abc import Sequence

from thunder_rollout.core.events import TurnRequested
from thunder_rollout.core.policies.base import (
    LeastInFlight,
    Placement,
    PolicyBase,
    ProgramView,
    View,
    home,
    spread_waiting,
)


class StickyPolicy(PolicyBase):
    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is not None:
            own = home(view, program, request.prompt_tokens)
            return own.name if own is not None else None
        return LeastInFlight(view.open_backends()).choose(request.prompt_tokens)

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        return spread_waiting(view, now)
