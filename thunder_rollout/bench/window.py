"""What is counted in a cell: turns that end while the window is open, and who waits."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from thunder_rollout.agent.loop import TurnResult
from thunder_rollout.core.cost import CostMeter, TurnCost
from thunder_rollout.core.events import Event, TurnRequested
from thunder_rollout.core.snapshot import SchedulerSnapshot
from thunder_rollout.runtime.client import SchedulerPort
from thunder_rollout.runtime.service import Grant
from thunder_rollout.sandbox.protocol import SandboxSpec


@dataclass(slots=True)
class Window:
    """Totals of tokens, seconds of turns. `reusable_tokens` of the prompts would have come from a cache that
    forgets nothing (but what new weights void)."""

    open: bool = False
    measured_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reusable_tokens: int = 0
    recomputed_tokens: int = 0
    num_ended: int = 0
    num_weight_updates: int = 0  # in the warm-up too
    imbalances: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)  # shares of an engine's KV
    cost: CostMeter = field(default_factory=CostMeter)

    @contextmanager
    def opened(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        self.open, opened_s = True, loop.time()
        try:
            yield
        finally:
            self.open, self.measured_s = False, loop.time() - opened_s

    def add_turn(self, result: TurnResult, previous_context_tokens: int, reusable_tokens: int) -> None:
        if not self.open:
            return
        generation = result.generation
        turn = TurnCost(
            prompt_tokens=generation.prompt_tokens,
            cached_tokens=generation.cached_tokens,
            previous_context_tokens=previous_context_tokens,
            output_tokens=len(generation.token_ids),
            prefill_s=generation.prefill_s,
            decode_s=generation.decode_s,
            refill_tokens=result.refill_tokens,
        )
        self.latencies_s.append(result.queue_s + result.engine_s)
        self.prompt_tokens += turn.prompt_tokens
        self.cached_tokens += turn.cached_tokens
        self.reusable_tokens += reusable_tokens
        self.recomputed_tokens += turn.recomputed_tokens
        self.cost.add_turn(turn)

    def add_hold(self, context_tokens: int, held_s: float) -> None:
        if self.open:
            self.cost.add_hold(context_tokens, held_s)

    def add_end(self) -> None:
        self.num_ended += self.open

    def add_drifts(self, scheduler: SchedulerSnapshot) -> None:
        """What the newest report of each engine corrected, where there is one."""
        for backend in scheduler.backends:
            if self.open and backend.drift_tokens is not None:
                self.drifts.append(backend.drift_tokens / backend.capacity_tokens)

    @property
    def drift_p95(self) -> float | None:
        return sorted(self.drifts)[int(0.95 * (len(self.drifts) - 1))] if self.drifts else None

    @property
    def imbalance(self) -> float:
        return statistics.fmean(self.imbalances) if self.imbalances else 0.0


class WaitMeter:
    """`SchedulerPort` that notes who waits for admission; what it asks is `scheduler`'s to answer."""

    def __init__(self, scheduler: SchedulerPort, window: Window) -> None:
        self._scheduler = scheduler
        self._window = window
        self.waiting: dict[str, float] = {}  # program: since, in seconds of the event loop

    async def open(self, program: str, *, owner: str = "", sandbox: SandboxSpec | None = None) -> None:
        await self._scheduler.open(program, owner=owner, sandbox=sandbox)

    async def admit(self, event: TurnRequested) -> Grant:
        self.waiting[event.program] = asyncio.get_running_loop().time()
        try:
            grant = await self._scheduler.admit(event)
        finally:
            del self.waiting[event.program]
        if self._window.open:
            self._window.waits_s.append(grant.queue_s)
        return grant

    async def post(self, event: Event) -> None:
        await self._scheduler.post(event)

    async def until_down(self, backend: str, generation: int) -> None:
        await self._scheduler.until_down(backend, generation)

    async def close(self, program: str, *, reason: str | None = None) -> None:
        await self._scheduler.close(program, reason=reason)

    def open_waits_s(self) -> list[float]:
        """Seconds for which those who wait now have waited."""
        now_s = asyncio.get_running_loop().time()
        return [now_s - since_s for since_s in self.waiting.values()]
