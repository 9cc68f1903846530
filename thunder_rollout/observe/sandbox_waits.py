"""How long programs waited for their sandboxes after their KV was granted, and ready sandboxes for their programs.

Of each preparation two things are compared: when its program's next turn was granted, and when the sandbox was
ready. Both come from the scheduler's events and decisions; a live run and its trace tell the same.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from thunder_rollout.core.decisions import Decision, PrepareSandbox, ReleaseSandbox, Restore
from thunder_rollout.core.events import Event, SandboxFailed, SandboxReady

MAX_WAITS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxWait:
    """One of `wait_s` and `idle_s` is 0."""

    granted_s: float  # when, on the scheduler's clock
    wait_s: float  # from the grant to the ready sandbox
    idle_s: float  # from the ready sandbox to the grant
    took_s: float | None  # of the start itself


@dataclass(slots=True)
class _Open:
    granted_s: float | None = None
    ready_s: float | None = None
    took_s: float | None = None


@dataclass(slots=True)
class SandboxWaits:
    """`waits` are the last `MAX_WAITS`, in the order in which they became known."""

    waits: deque[SandboxWait] = field(default_factory=lambda: deque(maxlen=MAX_WAITS))
    _open: dict[str, _Open] = field(default_factory=dict)

    def observe(self, event: Event, decisions: list[Decision], now: float) -> None:
        if isinstance(event, SandboxReady) and (known := self._open.get(event.program)) is not None:
            known.ready_s, known.took_s = now, event.took_s
            self._note(event.program, known)
        elif isinstance(event, SandboxFailed):
            self._open.pop(event.program, None)
        for decision in decisions:
            match decision:
                case PrepareSandbox():
                    self._open[decision.program] = _Open()
                case ReleaseSandbox():
                    self._open.pop(decision.program, None)
                case Restore(grant=int()) if (known := self._open.get(decision.program)) is not None:
                    known.granted_s = now if known.granted_s is None else known.granted_s
                    self._note(decision.program, known)
                case _:
                    pass

    def wait_p95_s(self) -> float:
        """0 without any."""
        return quantile([wait.wait_s for wait in self.waits], 0.95)

    def mean_idle_s(self) -> float:
        return sum(wait.idle_s for wait in self.waits) / len(self.waits) if self.waits else 0.0

    def _note(self, program: str, known: _Open) -> None:
        if known.granted_s is None or known.ready_s is None:
            return
        del self._open[program]
        self.waits.append(
            SandboxWait(
                granted_s=known.granted_s,
                wait_s=max(0.0, known.ready_s - known.granted_s),
                idle_s=max(0.0, known.granted_s - known.ready_s),
                took_s=known.took_s,
            )
        )


def quantile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them don't exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
