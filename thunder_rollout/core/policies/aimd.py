"""`aimd`: `capped` whose limit finds itself: additive growth, multiplicative cut.

Every tick looks back at the turns since the last: of the prompt tokens that had been computed
before, which share was not in the cache any more? If that is above `max_lost_share`, or the bound
programs outgrew the capacity, the limit is cut to `cut_share` of the active programs and the newest
are paused (acting ones first). Else, while someone waits and usage is below `target_usage`, it grows
by `grow_programs` a backend. Engines that report no cached tokens are judged by usage alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from thunder_rollout.core.config import AimdConfig
from thunder_rollout.core.events import Event, FinishReason, TurnEnded, TurnRequested
from thunder_rollout.core.policies.base import Placement, ProgramView, View, spread_waiting
from thunder_rollout.core.policies.sticky import StickyPolicy
from thunder_rollout.core.program import Phase, Status
from thunder_rollout.core.queue import SortKey


class AimdPolicy(StickyPolicy):
    def __init__(self, config: AimdConfig) -> None:
        self._config = config
        self._max_programs: float | None = None  # before the first backend is up
        self._contexts: dict[str, int] = {}  # program -> tokens when its last turn ended
        self._computed: dict[str, dict[int, int]] = {}  # program -> grant -> prompt tokens computed before
        self._computed_tokens = 0  # since the last tick
        self._lost_tokens = 0

    @property
    def max_programs(self) -> int:
        return max(1, round(self._max_programs or 1.0))

    def queue_key(self, program: ProgramView) -> SortKey:
        return (program.arrived_s,)

    def changed(self, program: ProgramView) -> None:
        if program.status is Status.TERMINATED:
            self._contexts.pop(program.program_id, None)
            self._computed.pop(program.program_id, None)

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        name = program.program_id
        held = {old: tokens for old, tokens in self._computed.get(name, {}).items() if old in program.turns}
        self._computed[name] = {**held, grant: min(request.prompt_tokens, self._contexts.get(name, 0))}
        self._contexts[name] = request.prompt_tokens

    def observe(self, event: Event, now: float) -> None:
        if not isinstance(event, TurnEnded):
            return
        computed = self._computed.get(event.program, {}).pop(event.grant, 0)
        if event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and event.cached_tokens is not None:
            self._computed_tokens += computed
            self._lost_tokens += max(0, computed - event.cached_tokens)
        if event.program in self._contexts:
            self._contexts[event.program] += event.output_tokens or 0

    def place(self, view: View, program: ProgramView, request: TurnRequested, now: float) -> str | None:
        if program.backend is None and (view.num_waiting_pending > 1 or self._num_free(view) == 0):
            return None
        return super().place(view, program, request, now)

    def restores(self, view: View, now: float, *, tick: bool) -> Sequence[Placement]:
        return spread_waiting(view, now, limit=self._num_free(view))

    def releases(self, view: View, now: float, *, tick: bool) -> Sequence[str]:
        if not tick or not view.backends:
            return ()
        lost_share = self._lost_tokens / self._computed_tokens if self._computed_tokens else 0.0
        self._computed_tokens = self._lost_tokens = 0
        usage = sum(backend.bound_tokens for backend in view.backends.values()) / sum(
            backend.capacity_tokens for backend in view.backends.values()
        )
        if lost_share > self._config.max_lost_share or usage > 1.0:
            num_marked = sum(backend.num_marked for backend in view.backends.values())
            self._max_programs = max(1.0, self._config.cut_share * (view.num_bound - num_marked))
            return self._newest(view, view.num_bound - num_marked - self.max_programs)
        if view.num_waiting_pending and usage < self._config.target_usage:
            self._max_programs = self._limit(view) + self._config.grow_programs * len(view.backends)
        return ()

    def _limit(self, view: View) -> float:
        if self._max_programs is None and view.backends:
            self._max_programs = float(self._config.initial_programs * len(view.backends))
        return self._max_programs or 1.0

    def _num_free(self, view: View) -> int:
        return max(0, round(self._limit(view)) - view.num_bound)

    def _newest(self, view: View, count: int) -> list[str]:
        programs = [p for backend in view.backends.values() for p in backend.programs.values() if not p.marked]
        programs.sort(key=lambda p: (p.phase is not Phase.ACTING, -p.arrived_s, p.program_id))
        return [program.program_id for program in programs[: max(0, count)]]
