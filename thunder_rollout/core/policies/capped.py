"""`capped`: `sticky` under a static limit on the programs that are active at once, over all
backends; first come, first served, and a program keeps its place until it ends.

The scheduler's liveness rule stands above the limit: a backend with no turn in flight takes the
next program even so, or a program that never speaks again would hold its place for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from thunder_rollout.core.config import CappedConfig
from thunder_rollout.core.events import TurnRequested
from thunder_rollout.core.policies.base import Placement, ProgramView, View, spread_waiting
from thunder_rollout.core.policies.sticky import StickyPolicy


class CappedPolicy(StickyPolicy):
    def __init__(self, config: CappedConfig) -> None:
        self._max_programs = config.max_programs

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is None and (view.num_waiting_pending > 1 or self._num_free(view) == 0):
            return None
        return super().place(view, program, request, now)

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        return spread_waiting(view, now, limit=self._num_free(view))

    def _num_free(self, view: View) -> int:
        return max(0, self._max_programs - view.num_bound)
