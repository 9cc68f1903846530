"""A read-only picture of the scheduler, for metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSnapshot:
    """`demand_tokens` is the sum of c over bound programs; `marked_tokens` of it will be freed."""

    backend: str
    generation: int
    capacity_tokens: int
    used_tokens: int | None  # as the engine last reported
    updating: bool
    demand_tokens: int
    marked_tokens: int
    num_reasoning: int
    num_acting: int
    num_marked: int
    num_in_flight: int
    drift_tokens: int | None  # believed cached and not, and cached and not believed; None: the engine doesn't tell


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSnapshot:
    backends: tuple[BackendSnapshot, ...]  # by name
    num_programs: int
    num_waiting_returning: int
    num_waiting_new: int
    num_waiting_acting: int  # paused with no request pending
    waiting_tokens: int  # sum of c over the queue
    pending_tokens: int  # of those of them with a request pending

    @property
    def num_waiting(self) -> int:
        return self.num_waiting_returning + self.num_waiting_new + self.num_waiting_acting
