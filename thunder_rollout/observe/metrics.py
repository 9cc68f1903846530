"""Totals and rates from the scheduler's own events and decisions.

The scheduler sees every turn, so its event stream is the one source: the live display, wandb and
the benchmark all read `MetricsSnapshot`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from thunder_rollout.core.decisions import Decision, Pause, Restore
from thunder_rollout.core.events import (
    Event,
    FinishReason,
    ProgramEnded,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
    Withdrawn,
)
from thunder_rollout.core.snapshot import SchedulerSnapshot
from thunder_rollout.observe.sandbox_waits import SandboxWaits

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """Totals since the first turn was requested, beside the scheduler's present state.

    `imbalance` is the mean over time of (fullest - emptiest backend) / capacity, in demand.
    `sandbox_wait_p95_s` and `sandbox_idle_s` (a mean) are of the last preparations, see `sandbox_waits`.
    """

    time_s: float
    num_turns: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    num_pauses: int
    num_restores: int
    queue_s: float
    tool_s: float
    imbalance: float
    sandbox_wait_p95_s: float
    sandbox_idle_s: float
    scheduler: SchedulerSnapshot

    @property
    def steps_per_min(self) -> float:
        return 60.0 * self.num_turns / self.time_s if self.time_s > 0 else 0.0

    @property
    def kv_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True)
class RunMetrics:
    """Folds events and decisions into totals; a few dict operations an event."""

    totals: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    sandboxes: SandboxWaits = field(default_factory=SandboxWaits)
    _requested: dict[str, tuple[int, float]] = field(default_factory=dict)
    _prompts: dict[int, int] = field(default_factory=dict)
    _tools: dict[str, float] = field(default_factory=dict)
    _began_at: float | None = None
    _imbalance_area: float = 0.0
    _imbalance: float = 0.0
    _imbalance_at: float = 0.0

    def observe(self, event: Event, decisions: list[Decision], now: float) -> None:
        match event:
            case TurnRequested():
                if self._began_at is None:
                    self._began_at = self._imbalance_at = now
                self._requested[event.request] = (event.prompt_tokens, now)
            case TurnEnded():
                self._count_turn(event)
            case Withdrawn(request=str(request)):
                self._requested.pop(request, None)
            case ToolStarted():
                self._tools[event.program] = now
            case ToolEnded() | ProgramEnded():
                started = self._tools.pop(event.program, None)
                self.seconds["tool"] += now - started if started is not None else 0.0
            case _:
                pass
        self.sandboxes.observe(event, decisions, now)
        for decision in decisions:
            self._count_decision(decision, now)

    def snapshot(self, scheduler: SchedulerSnapshot, now: float) -> MetricsSnapshot:
        self._note_imbalance(scheduler, now)
        time_s = 0.0 if self._began_at is None else now - self._began_at
        return MetricsSnapshot(
            time_s=time_s,
            num_turns=self.totals["turns"],
            prompt_tokens=self.totals["prompt"],
            cached_tokens=self.totals["cached"],
            output_tokens=self.totals["output"],
            num_pauses=self.totals["pauses"],
            num_restores=self.totals["restores"],
            queue_s=self.seconds["queue"],
            tool_s=self.seconds["tool"],
            imbalance=self._imbalance_area / time_s if time_s > 0 else 0.0,
            sandbox_wait_p95_s=self.sandboxes.wait_p95_s(),
            sandbox_idle_s=self.sandboxes.mean_idle_s(),
            scheduler=scheduler,
        )

    def _count_turn(self, event: TurnEnded) -> None:
        prompt_tokens = self._prompts.pop(event.grant, 0)
        self.totals["output"] += event.output_tokens or 0  # of a turn that was cut what counts: it goes on from there
        if event.finish_reason in _COMPLETE:
            self.totals["turns"] += 1
            self.totals["prompt"] += prompt_tokens
            self.totals["cached"] += event.cached_tokens or 0

    def _count_decision(self, decision: Decision, now: float) -> None:
        match decision:
            case Restore(request=str(request), grant=int(grant)):
                prompt_tokens, since = self._requested.pop(request, (0, now))
                self._prompts[grant] = prompt_tokens
                self.seconds["queue"] += now - since
                self.totals["restores"] += 1
            case Pause():
                self.totals["pauses"] += 1
            case _:
                pass

    def _note_imbalance(self, scheduler: SchedulerSnapshot, now: float) -> None:
        shares = [b.demand_tokens / b.capacity_tokens for b in scheduler.backends]
        self._imbalance_area += self._imbalance * (now - self._imbalance_at)
        self._imbalance = max(shares) - min(shares) if shares else 0.0
        self._imbalance_at = now
