"""Where programs have KV, and where they gave it up: what a `Pause` means to an engine.

An engine with `release_on_pause` hears of it with the next turn it is granted, for nothing takes blocks
before. A grant that is never used loses what it told, and LRU decides. In the simulator (`adaptive`, load
4, pairs of seeds, 95% intervals) it gained 4.1% (+-1.7) of the steps of `tool_orchestration` and 3.5%
(+-0.8) of `mini_swe_agent` on h100x8_glm46_fp8, where programs act for so long that LRU reaches what they
have while it spares what ended programs left; 0.5% (+-0.5) with the bench's short contexts on cpu_tiny. On two
real CPU engines (`short_tools`, load 4, five pairs of 18 s on a busy machine) it did 1.00 +- 0.27 times the steps
at hits of 0.84 against 0.83, and recomputed 24k tokens a window against 37k; the p95 of drift of the five windows
was 1.1% of capacity in the mean and 2.2% at most (1.6% and 4.1% without it). So it is off unless asked for.
`thunder-rollout simulate sim_engine.release_on_pause=true` shows it.
"""

from __future__ import annotations

from collections.abc import Iterable

from thunder_rollout.core.decisions import Decision, Expire, Pause, Restore
from thunder_rollout.core.events import BackendDown, Event, ProgramEnded, Withdrawn


class Places:
    def __init__(self) -> None:
        self._homes: dict[str, str] = {}  # backend by program, while it is bound
        self._released: dict[str, dict[str, None]] = {}  # programs by backend

    def note(self, event: Event, decisions: Iterable[Decision]) -> None:
        """An event that the scheduler took, and what it decided."""
        match event:
            case ProgramEnded(program=program) | Withdrawn(program=program, request=None):
                self._give_up(program)
            case BackendDown(backend=backend):
                self._released.pop(backend, None)
            case _:
                pass
        for decision in decisions:
            match decision:
                case Pause(program=program) | Expire(program=program):
                    self._give_up(program)
                case Restore(program=program, backend=backend):
                    if self._homes.get(program) != backend:
                        self._give_up(program)
                    self._homes[program] = backend
                    self._released.get(backend, {}).pop(program, None)
                case _:
                    pass

    def take_released(self, backend: str) -> tuple[str, ...]:
        """The programs that gave up their KV there and that nobody told the engine of."""
        return tuple(self._released.pop(backend, ()))

    def _give_up(self, program: str) -> None:
        home = self._homes.pop(program, None)
        if home is not None:
            self._released.setdefault(home, {})[program] = None
